"""A sweep as a job array in a real SLURM: a run for each task, in a folder of its own."""

from pathlib import Path
from typing import Any

import pytest
from helpers.long_run import has_iteration
from helpers.slurm import Job

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_an_array_trains_every_run_and_queues_again_only_what_stopped(runs: Any) -> None:
    file = runs.config.parent / "sweep.txt"
    # the second task has the id of the whole array
    file.write_text("training.train_iters=4 name=short\ntraining.train_iters=60 name=long model.ffn_hidden_size=128\n")
    options = ("--parsable", f"--output={runs.cluster.folder}/job-%A_%a.log")
    sweep = (str(ROOT / "scripts/sweep.sh"), "--slurm", *options, "--", str(runs.config), str(file))
    array = runs.cluster.submit(*sweep)
    short, long = (Job(runs.cluster, f"{array.number}_{task}") for task in (1, 2))
    long.wait_for(lambda: has_iteration(runs.folder("long"), 7))
    runs.cluster.call("scancel", "--batch", "--signal=USR1", long.number)
    assert short.end() == ("COMPLETED", "0:0"), short.log
    assert long.end() == ("COMPLETED", "0:0"), long.log
    assert short.fields()["Restarts"] == "0"
    assert long.fields()["Restarts"] == "1", long.log
    assert (runs.folder("short") / "checkpoints/step_00000004/format.json").exists()
    assert (runs.folder("long") / "checkpoints/step_00000060/format.json").exists()
    assert "ffn_hidden_size: 128" in (runs.folder("long") / "config.yaml").read_text()
