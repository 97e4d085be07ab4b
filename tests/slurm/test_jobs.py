"""Jobs in a real SLURM: they train, and one that is told to stop saves, queues itself again and goes on."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.long_run import TRAIN_ITERS, read_losses
from helpers.slurm import Job

from megatron_ee.training.operations.attempts import REFUSED, STOPPED

Losses = list[dict[str, float]]


def _outcome(run: Path, attempt: int) -> dict[str, Any]:
    return json.loads((run / f"attempts/{attempt}/outcome.json").read_text())


def _attempts(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "attempts").iterdir())


def _check_that_it_went_on(run: Path, job: Job, undisturbed: Losses, *, reason: str) -> None:
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert job.fields()["Restarts"] == "1"
    assert "queued again" in job.log
    assert _attempts(run) == ["1", "2"]
    first, second = _outcome(run, 1), _outcome(run, 2)
    assert (first["exit_status"], first["reason"]) == (STOPPED, reason)
    assert (second["exit_status"], second["reason"]) == (0, "complete")
    assert 7 <= first["iteration"] < second["iteration"]
    assert list(run.glob("metrics*")) == [run / "metrics.jsonl"], "nothing was trained twice"
    assert read_losses(run) == undisturbed, "bit for bit"


@pytest.mark.slow
def test_a_signal_before_the_time_limit_saves_and_queues_again(runs: Any, undisturbed: Losses) -> None:
    job = runs.launch("signalled", MAX_REQUEUES="1")
    runs.wait_until_begun("signalled", job)
    runs.cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    _check_that_it_went_on(runs.folder("signalled"), job, undisturbed, reason="SIGUSR1")
    assert job.fields()["JobName"] == "signalled"
    assert "2 local ranks" in job.log


@pytest.mark.slow
def test_a_preempted_job_saves_and_queues_itself_again(runs: Any, undisturbed: Losses) -> None:
    job = runs.submit("preempted", "logging.wandb={project: slurm, mode: offline}")
    runs.wait_until_begun("preempted", job)
    runs.cluster.sbatch("--partition=high", f"--nodelist={job.fields()['NodeList']}", "--wrap=true")
    _check_that_it_went_on(runs.folder("preempted"), job, undisturbed, reason="SIGTERM")
    (wandb_id,) = {path.read_text().strip() for path in runs.folder("preempted").glob("wandb_id")}
    written = list(runs.folder("preempted").glob("wandb/offline-run-*/*.wandb"))
    assert len(written) == 2, "one for each start"
    assert {path.name for path in written} == {f"run-{wandb_id}.wandb"}, "and the same run for both"


@pytest.mark.slow
def test_a_job_trains_two_ranks_to_the_end(runs: Any, undisturbed: Losses) -> None:
    job = runs.submit("alone")
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert job.fields()["Restarts"] == "0"
    assert "2 local ranks" in job.log
    assert read_losses(runs.folder("alone")) == undisturbed, "bit for bit, as without SLURM"
    assert [of["iteration"] for of in undisturbed][-1] == TRAIN_ITERS


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_queued_again(runs: Any) -> None:
    job = runs.submit("cancelled")
    runs.wait_until_begun("cancelled", job)
    runs.cluster.call("scancel", job.number)
    state, _ = job.end()
    assert state == "CANCELLED", job.log
    assert job.fields()["Restarts"] == "0"
    job.wait_for(lambda: "not queued again" in job.log)
    outcome = _outcome(runs.folder("cancelled"), 1)
    assert outcome["exit_status"] == STOPPED
    checkpoint = runs.folder("cancelled") / f"checkpoints/step_{outcome['iteration']:08d}"
    assert (checkpoint / "format.json").exists()


@pytest.mark.slow
def test_two_nodes_train_as_one(runs: Any, undisturbed: Losses) -> None:
    job = runs.submit("two-nodes", options=("--nodes=2",))
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert "1 local rank" in job.log
    assert read_losses(runs.folder("two-nodes")) == undisturbed


def test_a_wrong_config_fails_with_status_2(runs: Any) -> None:
    job = runs.submit("wrong", "model.num_layrs=3")
    assert job.end() == ("FAILED", f"{REFUSED}:0")
    assert "did you mean 'num_layers'?" in job.log
    assert not runs.folder("wrong").exists()


@pytest.mark.slow
def test_a_crash_fails_and_is_not_queued_again(runs: Any) -> None:
    job = runs.submit("crashed")
    runs.wait_until_begun("crashed", job)
    about = json.loads((runs.folder("crashed") / "attempts/1/environment.json").read_text())
    os.kill(about["process"], signal.SIGKILL)
    assert job.end() == ("FAILED", "1:0"), job.log
    assert job.fields()["Restarts"] == "0"


@pytest.mark.slow
def test_a_job_is_not_queued_again_beyond_its_limit(runs: Any) -> None:
    job = runs.submit("limited", "training.exit_duration=0.001", MAX_REQUEUES="0")
    assert job.end() == ("FAILED", f"{STOPPED}:0"), job.log
    assert job.fields()["Restarts"] == "0"
    assert re.search(r"not queued again after MAX_REQUEUES=0 times", job.log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option", "reason"),
    [("timed", "--signal=B:USR1@40", "SIGUSR1"), ("late", "--signal=B:CONT@40", "SIGTERM")],
    ids=["with a word before it", "without one"],
)
def test_a_real_time_limit_saves_and_queues_again(runs: Any, name: str, option: str, reason: str) -> None:
    # without a word, the job is told at its limit, and has KillWait to save
    job = runs.submit(name, "training.train_iters=90000", options=("--time=2", option), MAX_REQUEUES="1")
    job.wait_for(lambda: job.fields()["Restarts"] == "1")
    outcome = _outcome(runs.folder(name), 1)
    assert (outcome["exit_status"], outcome["reason"]) == (STOPPED, reason), job.log
    job.wait_for(lambda: "resumed from" in job.log.partition("requeued 1 times")[2])
    runs.cluster.call("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
