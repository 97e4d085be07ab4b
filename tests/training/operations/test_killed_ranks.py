"""Ranks that are killed or stopped at any moment: the job ends, says where each was, and loses nothing."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.long_run import TRAIN_ITERS

from megatron_ee.checkpoint.folders import is_whole
from megatron_ee.training.operations.attempts import COMPLETE, STOPPED

Losses = list[dict[str, float]]

LIMIT_S = 10.0
"""What the other ranks have to go, once one is dead."""


def _kill(run: Any, local_rank: int) -> None:
    """Kill a rank, and wait until the others have gone, too."""
    ranks = sorted(run.ranks())
    os.kill(ranks[local_rank], signal.SIGKILL)
    deadline = time.monotonic() + LIMIT_S
    while set(ranks) & set(run.ranks()):
        assert time.monotonic() < deadline, "the others are still there"
        time.sleep(0.05)


def _check_that_nothing_is_lost(run: Any, undisturbed: Losses, killed: int) -> None:
    status, said = run.end()
    assert status == COMPLETE, said
    assert "restart 1 of 1" in said
    fault = run.fault(1)
    assert (fault["fault"], fault["rank"], fault["stage"]) == ("died", killed, killed), said
    assert f"a rank has died: rank {killed} (stage {killed}): iteration {fault['iteration']}, " in said
    assert len(fault["ranks"]) == 2
    assert run.losses() == undisturbed, "bit for bit"
    assert run.outcome(2)["reason"] == "complete"


def test_a_run_that_loses_a_rank_and_is_told_to_stop_goes_on_as_if_nothing_had_been(
    start_run: Callable[..., Any], undisturbed: Losses
) -> None:
    """One after the other, as starts take long; each by itself is below and in `test_stopping.py`."""
    run = start_run("disturbed", MAX_RESTARTS="1")
    run.wait_for_iteration(7)
    _kill(run, 1)
    run.wait_for(lambda: (run.folder / "attempts/2").exists())
    run.process.send_signal(signal.SIGTERM)
    status, said = run.end()
    assert status == STOPPED, said
    assert "restart 1 of 1" in said
    fault, outcome = run.fault(1), run.outcome(2)
    assert (fault["fault"], fault["rank"], fault["stage"]) == ("died", 1, 1), said
    assert f"a rank has died: rank 1 (stage 1): iteration {fault['iteration']}, " in said
    assert len(fault["ranks"]) == 2
    assert "SIGTERM: stopped after iteration" in said
    assert outcome["reason"] == "SIGTERM" and outcome["iteration"] < TRAIN_ITERS
    if outcome["iteration"] > 0:  # the rank may have been killed before anything was saved
        assert (run.folder / f"checkpoints/step_{outcome['iteration']:08d}/format.json").exists()
    again = start_run("disturbed")
    status, said = again.end()
    assert status == COMPLETE, said
    assert again.losses() == undisturbed, "bit for bit, and in an interval of the log, too"
    assert again.outcome(3)["reason"] == "complete"
    assert json.loads((run.folder / "attempts/3/environment.json").read_text())["started"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_killed_at_any_moment_costs_nothing_but_time(
    start_run: Callable[..., Any], undisturbed: Losses, seed: int
) -> None:
    moments = random.Random(seed)
    run = start_run(f"killed-{seed}", MAX_RESTARTS="1")
    run.wait_for_iteration(moments.choice(range(7, 45, 7)))
    time.sleep(moments.uniform(0, 0.1))
    local_rank = moments.randrange(2)
    _kill(run, local_rank)
    _check_that_nothing_is_lost(run, undisturbed, local_rank)


def _is_saving(checkpoints: Path) -> bool:
    return any(not is_whole(folder) for folder in checkpoints.glob("step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("local_rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_while_it_saves_costs_nothing_but_time(
    start_run: Callable[..., Any], undisturbed: Losses, local_rank: int
) -> None:
    run = start_run(f"killed-saving-{local_rank}", MAX_RESTARTS="1")
    run.wait_for(lambda: _is_saving(run.folder / "checkpoints"))
    _kill(run, local_rank)
    _check_that_nothing_is_lost(run, undisturbed, local_rank)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_which_says_what_it_was_at(start_run: Callable[..., Any]) -> None:
    run = start_run("stopped", "faults.hang_timeout=8", "checkpoint.interval=0")
    run.wait_for_iteration(7)
    stopped = sorted(run.ranks())[1]
    os.kill(stopped, signal.SIGSTOP)
    started = time.monotonic()
    status, said = run.end()
    assert status == 1
    assert time.monotonic() - started < 8 + LIMIT_S
    assert run.ranks() == [], "killed, since a stopped process hears nothing else"
    fault = run.fault(1)
    assert (fault["fault"], fault["rank"], fault["stage"]) == ("hung", 1, 1)
    assert fault["seconds"] >= 8
    assert f"a rank hangs: rank 1 (stage 1): iteration {fault['iteration']}, " in said
    assert "megatron_ee/training/trainer.py" in said, "a rank that is not stopped shows where it waits"


@pytest.mark.slow
def test_a_job_that_was_suspended_as_a_whole_goes_on(start_run: Callable[..., Any], undisturbed: Losses) -> None:
    """As SLURM does for a job that has to make room: nobody has hung."""
    run = start_run("suspended", "faults.hang_timeout=20")
    run.wait_for_iteration(28)
    ranks = [psutil.Process(pid) for pid in run.ranks()]
    for rank in ranks:
        rank.suspend()
    time.sleep(25)
    for rank in ranks:
        rank.resume()
    status, said = run.end()
    assert status == COMPLETE, said
    assert run.losses() == undisturbed
