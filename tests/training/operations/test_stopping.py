"""Stop requests: what a process has been told; and runs that are told to stop, as users see them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.long_run import write_long_run

from megatron_ee.training.operations.attempts import COMPLETE, STOPPED
from megatron_ee.training.operations.stopping import REASONS, SIGNALS, StopRequests

Losses = list[dict[str, float]]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.usefixtures("handlers")
def test_a_signal_leaves_word(number: signal.Signals) -> None:
    requests = StopRequests()
    requests.listen()
    assert REASONS[requests.reason()] == ""
    os.kill(os.getpid(), number)
    assert REASONS[requests.reason()] == number.name


@pytest.mark.usefixtures("handlers")
def test_what_train_sh_says_after_a_signal_does_not_hide_it() -> None:
    requests = StopRequests()
    requests.listen()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert REASONS[requests.reason()] == "SIGTERM"


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_is_the_usual_end() -> None:
    StopRequests().listen()
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_time_is_up_after_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    requests = StopRequests(exit_duration=2.0)
    for now, reason in ((1000.0, ""), (1119.9, ""), (1120.0, "exit_duration")):  # noqa: B007 (the clock reads it)
        assert REASONS[requests.reason()] == reason


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_run_saves_and_goes_on_as_if_nothing_had_been(
    start_run: Callable[..., Any], undisturbed: Losses, number: signal.Signals
) -> None:
    run = start_run(number.name)
    run.wait_for_iteration(7)
    run.process.send_signal(number)
    status, said = run.end()
    assert status == STOPPED, said
    assert f"{number.name}: stopped after iteration" in said
    outcome = run.outcome(1)
    assert outcome["reason"] == number.name
    assert outcome["iteration"] < 60
    assert (run.folder / f"checkpoints/step_{outcome['iteration']:08d}/format.json").exists()
    again = start_run(number.name)
    status, said = again.end()
    assert status == COMPLETE, said
    assert again.losses() == undisturbed, "not in an interval of the log, either"
    assert again.outcome(2)["reason"] == "complete"
    assert json.loads((run.folder / "attempts/2/environment.json").read_text())["started"]


@pytest.mark.slow
def test_a_run_stops_by_itself_before_its_limit(tmp_path: Path) -> None:
    alone = ["name=limited", "parallel.pipeline=1", "training.exit_duration=0.001"]
    command = [sys.executable, "-m", "megatron_ee.training", str(write_long_run(tmp_path)), *alone]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == STOPPED, ended.stderr
    outcome = json.loads((tmp_path / "runs/limited/attempts/1/outcome.json").read_text())
    assert outcome["reason"] == "exit_duration"


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_the_next_start_goes_on(
    start_run: Callable[..., Any], undisturbed: Losses
) -> None:
    run = start_run("killed")
    run.wait_for_iteration(28)
    os.kill(run.ranks()[-1], signal.SIGKILL)
    status, _ = run.end()
    assert status == 1
    assert run.ranks() == []
    assert not (run.folder / "attempts/1/outcome.json").exists(), "it had no time to say anything"
    again = start_run("killed")
    status, said = again.end()
    assert status == COMPLETE, said
    assert "step_00000025" in said
    assert again.losses() == undisturbed
    assert again.outcome(2)["reason"] == "complete"


@pytest.mark.slow
def test_a_killed_torchrun_leaves_no_ranks_behind(start_run: Callable[..., Any]) -> None:
    run = start_run("orphans")
    run.wait_for_iteration(7)
    ranks = run.ranks()
    assert len(ranks) == 2
    (torchrun,) = {int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in ranks}
    os.kill(torchrun, signal.SIGKILL)
    status, _ = run.end()
    assert status == 128 + signal.SIGKILL
    assert run.ranks() == []


@pytest.mark.slow
@pytest.mark.parametrize("who", ["train.sh", "all"])
def test_a_run_that_is_told_again_and_again_still_saves(start_run: Callable[..., Any], who: str) -> None:
    """SLURM tells a job before its limit and again at it; and it may tell every process of it."""
    run = start_run(f"told-{who}", own_group=True)
    run.wait_for_iteration(7)
    for number in [signal.SIGUSR1, *[signal.SIGTERM] * 20]:
        try:
            if who == "all":
                os.killpg(run.process.pid, number)
            else:
                run.process.send_signal(number)
        except ProcessLookupError:
            break
        time.sleep(0.03)
    status, said = run.end()
    assert status == STOPPED, said
    outcome = run.outcome(1)
    assert (run.folder / f"checkpoints/step_{outcome['iteration']:08d}/format.json").exists()
    assert "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_reaches_all_processes_and_saves_once(start_run: Callable[..., Any]) -> None:
    run = start_run("ctrl-c", own_group=True)
    run.wait_for_iteration(7)
    os.killpg(run.process.pid, signal.SIGINT)
    status, said = run.end()
    assert status == STOPPED, said
    assert "train.sh: SIGINT: the ranks finish their step, save, and stop" in said
    assert run.outcome(1)["iteration"] >= 7


@pytest.mark.slow
def test_ctrl_c_twice_ends_all_at_once(start_run: Callable[..., Any]) -> None:
    run = start_run("ctrl-c-twice", "training.train_iters=100000", own_group=True)
    run.wait_for_iteration(7)
    for rank in run.ranks():
        os.kill(rank, signal.SIGSTOP)  # nothing that it would hear
    for _ in range(2):
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.7)
    status, said = run.end()
    assert status == 128 + signal.SIGKILL, said
    assert run.ranks() == []


def test_a_run_that_is_told_before_it_has_ranks_wants_to_be_started_again(start_run: Callable[..., Any]) -> None:
    run = start_run("early")
    run.wait_for(lambda: b"distributed.run" in _children_s_command_lines(run.process.pid))
    run.process.send_signal(signal.SIGUSR1)
    status, said = run.end()
    assert status == STOPPED, said
    assert "SIGUSR1 came before there was anything to save" in said
    assert not (run.folder / "attempts").exists()


def _children_s_command_lines(parent: int) -> bytes:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return b" ".join(line.read_bytes() for pid in children if (line := Path(f"/proc/{pid}/cmdline")).exists())
