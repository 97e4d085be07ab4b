"""A stage that dies or hangs while others wait for it: all requests end with an error that names it, and no process
stays."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers.saved import save_random_run

from megatron_ee.parallel.mesh import Mesh

_TIMEOUT_S = 3.0


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


@pytest.fixture
def stages(tmp_path: Path, mesh: Mesh) -> Iterator[list[subprocess.Popen[str]]]:
    """Three, decoding two endless texts; each as torchrun would have started it."""
    save_random_run(tmp_path / "run", mesh, layers=[2, 5])
    port = str(_free_port())
    command = [sys.executable, "-m", "megatron_ee.inference", "--checkpoint", str(tmp_path / "run")]
    command += ["--prompt", "a", "--prompt", "b", "inference.parallel.pipeline=3", "inference.exit.threshold=0.012"]
    command += [f"inference.parallel.timeout={_TIMEOUT_S}", "inference.sampling.max_new_tokens=20000"]
    command += ["inference.sampling.ignore_eos=true"]
    processes = []
    for rank in range(3):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
            "PYTHONUNBUFFERED": "1",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def _wait_for_text(first: subprocess.Popen[str]) -> None:
    assert first.stdout is not None
    for _ in range(20):
        assert first.stdout.read(1), "it has ended"


def _errors_of(others: Sequence[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=60)[1].strip() for process in others]


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_stage_ends_all_requests_and_processes(stages: list[subprocess.Popen[str]], lost: int) -> None:
    _wait_for_text(stages[0])
    stages[lost].kill()
    others = [process for number, process in enumerate(stages) if number != lost]
    started = time.monotonic()
    errors = _errors_of(others)
    assert time.monotonic() - started < _TIMEOUT_S + 5
    assert [process.returncode for process in others] == [2, 2]
    for error in errors:
        assert len(error.splitlines()) == 1, error
        assert re.match(rf"prompts\.[01]: stage {lost} \(rank {lost}\) does not answer: ", error), error


@pytest.mark.slow
def test_a_stage_that_hangs_ends_them_within_the_time_out(stages: list[subprocess.Popen[str]]) -> None:
    _wait_for_text(stages[0])
    stages[1].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    errors = _errors_of([stages[0], stages[2]])
    assert _TIMEOUT_S - 1 < time.monotonic() - started < 2 * _TIMEOUT_S + 5
    assert [stages[0].returncode, stages[2].returncode] == [2, 2]
    for error in errors:
        assert re.match(r"prompts\.[01]: stage 1 \(rank 1\) does not answer: ", error), error
