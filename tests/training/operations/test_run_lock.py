"""A run is trained once at a time, and by the next as soon as the first is gone, however it went."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.errors import FieldError
from megatron_ee.training.operations.attempts import REFUSED, STOPPED
from megatron_ee.training.operations.run_lock import RunLock

HOLD = """
import sys; from pathlib import Path; from megatron_ee.training.operations.run_lock import RunLock
lock = RunLock(Path(sys.argv[1])); lock.take(); print("held", flush=True); sys.stdin.readline()
"""


def _hold(run: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(run)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_start_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    holder = _hold(tmp_path / "run")
    try:
        with pytest.raises(FieldError, match=rf"^name: .*/run is being trained already, by process {holder.pid} on "):
            RunLock(tmp_path / "run", patience=0.3).take_if_begun()
    finally:
        holder.communicate("\n")
    lock = RunLock(tmp_path / "run", patience=0.3)
    lock.take()
    lock.take()
    lock.release()


def test_the_next_start_waits_for_one_that_is_about_to_end(tmp_path: Path) -> None:
    holder = _hold(tmp_path / "run")
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -{signal.SIGKILL} {holder.pid}"])
    started = time.monotonic()
    RunLock(tmp_path / "run").take()
    assert 0.3 < time.monotonic() - started < 20
    holder.wait()


def test_a_run_that_has_not_begun_gets_no_folder(tmp_path: Path) -> None:
    RunLock(tmp_path / "run").take_if_begun()
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def has_no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", has_no_locks)
    monkeypatch.setattr(logging.getLogger("megatron_ee"), "propagate", True)
    RunLock(tmp_path / "run").take()
    assert "this file system has no locks (Function not implemented)" in caplog.text


@pytest.mark.slow
def test_two_starts_of_one_run_are_one_run(start_run: Callable[..., Any]) -> None:
    first = start_run("twice", "training.train_iters=100000", "logging.interval=1")
    first.wait_for_iteration(7)
    second = start_run("twice", "logging.interval=100")
    status, said = second.end()
    assert status == REFUSED, said
    assert "is being trained already, by process" in said
    first.process.send_signal(signal.SIGTERM)
    status, said = first.end()
    assert status == STOPPED, said
    iterations = [record["iteration"] for record in first.losses() if "train/loss" in record]
    assert iterations == list(range(1, iterations[-1] + 1)), "the second has written into the first one's record"
