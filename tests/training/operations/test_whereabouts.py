"""What a rank is at can be seen from other processes, also when it is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.training.operations.whereabouts import Board, Whereabouts

DIE_AT_AN_ACTION = """
import os, signal, sys
from pathlib import Path
from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.training.operations.whereabouts import Board
whereabouts = Board(Path(sys.argv[1]), 2).join(1, rank=7, stage=3)
whereabouts.enter("forward_backward", 12)
whereabouts.begin(Action(Kind.B, 3, 1, 5))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_rank_was_at_is_still_there(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 2)
    board.join(0, rank=6, stage=3)
    died = subprocess.Popen([sys.executable, "-c", DIE_AT_AN_ACTION, str(board.folder)])
    assert died.wait(timeout=60) == -signal.SIGKILL
    alive, dead = board.look()
    assert (alive.pid, alive.rank, alive.phase, alive.action) == (os.getpid(), 6, "start", None)
    assert (dead.pid, dead.rank, dead.stage, dead.iteration) == (died.pid, 7, 3, 12)
    assert dead.action == Action(Kind.B, 3, 1, 5)
    assert not dead.is_over
    expected = "rank 7 (stage 3): iteration 12, B of micro-batch 5, chunk 1, for 2.5 s"
    assert dead.describe(dead.since + 2.5) == expected


@pytest.mark.parametrize("kind", Kind)
def test_an_action_is_seen_from_its_begin_to_its_end(kind: Kind) -> None:
    whereabouts, before = Whereabouts(rank=1, stage=2), time.monotonic()
    whereabouts.enter("forward_backward", 4)
    action = Action(kind, 2, 0, 9)
    whereabouts.begin(action)
    assert whereabouts.see().action == action
    whereabouts.end(action)
    seen = whereabouts.see()
    assert (seen.action, seen.phase, seen.iteration) == (None, "forward_backward", 4)
    assert before <= seen.since <= time.monotonic()
    whereabouts.enter("optimizer")
    assert (whereabouts.see().phase, whereabouts.see().iteration) == ("optimizer", 4)
    whereabouts.leave()
    assert whereabouts.see().is_over


def test_a_long_phase_is_cut_and_nothing_else_is_touched() -> None:
    whereabouts = Whereabouts()
    whereabouts.enter("a phase of too many letters", 3)
    assert whereabouts.see().phase == "a phase of too m"
    assert whereabouts.see().iteration == 3


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_board_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "board"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(PermissionError, match="another user's"):
        Board(folder, 1).join(0, rank=0, stage=0)


def test_a_cleared_board_can_still_be_seen(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 1)
    whereabouts = board.join(0, rank=0, stage=0)
    board.look()
    board.clear()
    assert not board.folder.exists()
    whereabouts.enter("close", 1)
    assert [seen.phase for seen in board.look()] == ["close"]
