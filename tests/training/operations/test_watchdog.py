"""What a watchdog takes for a fault, and what it does not. Whole runs with faults: test_killed_ranks.py."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.training.operations.watchdog import FAULTY, Finding, Watchdog
from megatron_ee.training.operations.whereabouts import Board

JOIN = """
import os, signal, sys, time
from pathlib import Path
from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.training.operations.watchdog import Watchdog
from megatron_ee.training.operations.whereabouts import Board
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
board = Board(folder / "board", 2)
own = board.join(rank, rank=rank, stage=rank)
own.enter("forward_backward", 3)
"""

LOOK = """
own.begin(Action(Kind.RECV_BACKWARD, 0, 0, 1))
watchdog = Watchdog(board, folder, hang_timeout=float(sys.argv[3]), beat=lambda: None)
print("ready", flush=True)
sys.stdin.readline()
watchdog.start()
time.sleep(60)
"""


def _rank(folder: Path, rank: int, code: str, *arguments: str) -> subprocess.Popen:
    """A rank of two in a process of its own, which joins the board and then does as it is told."""
    command = [sys.executable, "-c", JOIN + code, str(folder), str(rank), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Rank 0 with a watchdog in a process of its own, beside rank 1, which is this test."""
    process: subprocess.Popen | None = None

    def look(hang_timeout: float) -> None:
        nonlocal process
        process = _rank(tmp_path, 0, LOOK, str(hang_timeout))
        assert process.stdout and process.stdout.readline() == "ready\n"

    def go_on(timeout: float = 30.0) -> tuple[int, str, dict]:
        assert process
        _, said = process.communicate("\n", timeout=timeout)
        path = tmp_path / "fault_0.json"
        return process.returncode, said, json.loads(path.read_text()) if path.exists() else {}

    board = Board(tmp_path / "board", 2)
    yield SimpleNamespace(look=look, go_on=go_on, board=board, folder=tmp_path)
    if process is not None:
        process.kill()
        process.wait()


def test_a_dead_rank_is_named_with_what_it_was_at(other: SimpleNamespace) -> None:
    other.look(hang_timeout=0)
    _rank(other.folder, 1, "own.begin(Action(Kind.F, 1, 0, 1))").communicate()
    status, said, fault = other.go_on()
    assert status == FAULTY
    assert "fault: a rank has died: rank 1 (stage 1): iteration 3, F of micro-batch 1, for " in said
    assert (fault["fault"], fault["rank"], fault["action"], fault["microbatch"]) == ("died", 1, "F1@1", 1)
    assert not other.board.folder.exists(), "nothing is left in the folder for temporary files"


def test_a_rank_that_has_left_is_not_missed(other: SimpleNamespace) -> None:
    other.look(hang_timeout=0)
    _rank(other.folder, 1, "own.leave()").communicate()
    with pytest.raises(subprocess.TimeoutExpired):
        other.go_on(timeout=3.0)


def test_a_rank_that_hangs_shows_where_it_is(other: SimpleNamespace) -> None:
    other.look(hang_timeout=2.0)
    other.board.join(1, rank=1, stage=1).leave()  # or it would be killed, and this test with it
    status, said, fault = other.go_on()
    assert status == FAULTY
    assert (fault["fault"], fault["rank"], fault["action"]) == ("hung", 0, "recv_backward1@0")
    assert "Thread 0x" in said


def _finding_of(board: Board, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Finding | None:
    watchdog = Watchdog(board, folder, hang_timeout=10.0, beat=lambda: None)
    late = time.monotonic() + 20.0
    monkeypatch.setattr(time, "monotonic", lambda: late)
    return watchdog.find()


def test_of_those_that_are_late_it_is_the_first_that_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board(tmp_path / "board", 4)
    ranks = [board.join(number, rank=number, stage=number) for number in range(4)]
    ranks[3].leave()
    ranks[0].begin(Action(Kind.RECV_BACKWARD, 0, 0, 1))
    ranks[2].begin(Action(Kind.X, 2, 0, 4))
    ranks[1].begin(Action(Kind.F, 1, 0, 2))
    finding = _finding_of(board, tmp_path, monkeypatch)
    assert finding is not None and finding.about is not None
    assert (finding.fault, finding.about.rank, finding.about.action) == ("hung", 2, Action(Kind.X, 2, 0, 4))


def test_a_process_that_was_stopped_is_the_culprit_though_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board(tmp_path / "board", 2)
    board.join(0, rank=0, stage=0).begin(Action(Kind.F, 0, 0, 1))
    wait_for_ever = "own.begin(Action(Kind.RECV_FORWARD, 1, 0, 0)); os.kill(os.getpid(), signal.SIGSTOP)"
    stopped = _rank(tmp_path, 1, wait_for_ever)
    try:
        os.waitpid(stopped.pid, os.WUNTRACED)
        finding = _finding_of(board, tmp_path, monkeypatch)
    finally:
        stopped.kill()
        stopped.wait()
    assert finding is not None and finding.about is not None
    assert (finding.fault, finding.about.rank) == ("hung", 1)


def test_a_fault_on_another_machine_ends_this_one(other: SimpleNamespace) -> None:
    other.look(hang_timeout=0)
    own = other.board.join(1, rank=1, stage=1)
    own.leave()
    (other.folder / "fault_1.json").write_text("{}")
    status, said, fault = other.go_on()
    assert status == FAULTY
    assert "the job has a fault on another machine: fault_1.json" in said
    assert fault["fault"] == "elsewhere"


def test_time_that_the_whole_job_was_suspended_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(tmp_path / "board", 1)
    board.join(0, rank=0, stage=0).enter("forward_backward", 1)
    watchdog = Watchdog(board, tmp_path, hang_timeout=100.0, beat=lambda: None)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert watchdog.find() is None
    now += 90.0
    watchdog.notice_sleep()
    assert watchdog.find() is None
    now += 90.0  # 180 s since the record changed, of which one stretch had no look at all
    assert watchdog.find() is None
    now += 20.0
    finding = watchdog.find()
    assert finding is not None
    assert finding.fault == "hung"
