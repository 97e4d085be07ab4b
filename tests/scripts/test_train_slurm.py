"""The SLURM launcher without SLURM: what it would submit, and a job's steps with programs that stand for SLURM's."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "scripts/train.slurm"

SCONTROL = f"""\
#!/usr/bin/env bash
case "$1 $2" in
  "show job") printf '   JobState=%s\\n   Command=%s tiny.yaml\\n' "$JOB_STATE" "{LAUNCHER}" ;;
  "show hostnames") printf 'n7\\nn8\\n' ;;
  "show node") echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=$3" ;;
  requeue*) echo "$*" >requeued ;;
esac
"""

# What srun would do on the second of two nodes.
SRUN = """\
#!/usr/bin/env bash
if [[ $1 == --help ]]; then echo "$SRUN_OPTIONS"; exit; fi
echo "$*" >step
while [[ $1 == -* ]]; do shift; done
export SLURM_NODEID=1
if [[ -n ${STATUS-} ]]; then exit "$STATUS"; fi
exec "$@"
"""


@pytest.fixture
def job(scripts: Any) -> Any:
    """Runs the launcher as a job's node does."""
    scripts.write_program("scontrol", SCONTROL)
    scripts.write_program("srun", SRUN)
    script = shutil.copy(LAUNCHER, scripts.folder / "slurm_script")
    variables = {
        "SLURM_JOB_ID": "12345",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "JOB_STATE": "RUNNING Reason=None",
    }

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return scripts.run(Path(script), *(arguments or ("tiny.yaml",)), **{**variables, **environment})

    return run


def test_a_dry_run_prints_what_it_would_submit(scripts: Any) -> None:
    done = scripts.run("train.slurm", "--dry-run", "--nodes=2", "--comment", "a b", "--", "tiny.yaml", "seed=7")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"sbatch --job-name=tiny --nodes=2 --comment 'a b' {LAUNCHER} tiny.yaml seed=7"
    assert "#SBATCH --signal=B:USR1@300" in lines
    assert lines[-1].startswith("srun --nodes=$SLURM_NNODES --ntasks=$SLURM_NNODES --ntasks-per-node=1 ")
    assert lines[-1].endswith(f"{ROOT}/scripts/train.sh tiny.yaml seed=7")
    assert "--container" not in lines[-1]


def test_a_dry_run_needs_no_options(scripts: Any) -> None:
    done = scripts.run("train.slurm", "--dry-run", "tiny.yaml")
    assert done.stdout.splitlines()[0] == f"sbatch --job-name=tiny {LAUNCHER} tiny.yaml"


def test_a_wrong_config_is_refused_before_it_is_submitted(scripts: Any) -> None:
    scripts.write_program("sbatch", "#!/bin/sh\ntouch submitted\n")
    done = scripts.run("train.slurm", "tiny.yaml", "optimizr.lr=1")
    assert done.returncode == 2
    assert "did you mean 'optimizer'?" in done.stderr
    assert not (scripts.folder / "submitted").exists()


def test_options_without_an_end_are_refused(scripts: Any) -> None:
    done = scripts.run("train.slurm", "--nodes=2", "tiny.yaml")
    assert done.returncode == 2
    assert done.stderr == "train.slurm: a -- ends sbatch's options, and CONFIG follows\n"


def test_the_usage_is_complete(scripts: Any) -> None:
    said = scripts.run("train.slurm", "--help").stdout
    assert said.startswith("Train as a SLURM job")
    assert said.rstrip().endswith("Exit status: that of scripts/train.sh.")
    assert "SBATCH --" not in said


def test_a_node_gets_its_place_from_slurm(job: Any, scripts: Any) -> None:
    done = job(SLURM_RESTART_COUNT="3")
    assert done.returncode == 0, done.stderr
    (started,) = scripts.started()
    assert "--nproc-per-node 1 --nnodes 2 " in started, "no GPUs: two stages, one on each node"
    assert "--rdzv-endpoint 10.0.0.7:20345 --rdzv-id 12345.3 --rdzv-conf is_host=0 " in started
    assert started.endswith(" tiny.yaml")


def test_a_node_starts_a_process_for_each_gpu_it_was_given(job: Any, scripts: Any) -> None:
    job(SLURM_GPUS_ON_NODE="8")
    job(SLURM_GPUS_ON_NODE="8", NPROC_PER_NODE="4")
    by_gpus, by_hand = scripts.started()
    assert "--nproc-per-node 8 " in by_gpus
    assert "--nproc-per-node 4 " in by_hand


def test_a_container_mounts_the_repository_and_the_folder(job: Any, scripts: Any) -> None:
    image = {"CONTAINER_IMAGE": "megatron_ee.sqsh", "CONTAINER_MOUNTS": "/data:/data", "STATUS": "0"}
    assert job(SRUN_OPTIONS="  --container-image=IMAGE", **image).returncode == 0
    step = (scripts.folder / "step").read_text()
    assert "--container-image=megatron_ee.sqsh" in step
    assert f"--container-mounts={ROOT}:{ROOT},{scripts.folder}:{scripts.folder},/data:/data" in step


def test_a_container_without_the_plug_in_is_refused(job: Any, scripts: Any) -> None:
    done = job(SRUN_OPTIONS="--nodes=N", CONTAINER_IMAGE="megatron_ee.sqsh")
    assert done.returncode == 2
    assert "pyxis" in done.stderr
    assert not (scripts.folder / "step").exists()


@pytest.mark.parametrize(
    ("status", "state", "is_requeued"),
    [
        (75, "RUNNING Reason=None", True),
        (75, "SIGNALING Reason=None", True),
        (75, "COMPLETING Reason=None", False),
        (75, "COMPLETING Reason=TimeLimit", True),
        (138, "RUNNING Reason=None", True),
        (143, "RUNNING Reason=None", True),
        (137, "RUNNING Reason=None", False),
        (1, "RUNNING Reason=None", False),
        (2, "RUNNING Reason=None", False),
        (0, "RUNNING Reason=None", False),
    ],
)
def test_a_job_is_queued_again_when_it_wants_to_go_on_and_may(
    job: Any, scripts: Any, status: int, state: str, is_requeued: bool
) -> None:
    done = job(STATUS=str(status), JOB_STATE=state)
    assert done.returncode == status
    assert (scripts.folder / "requeued").exists() == is_requeued


@pytest.mark.parametrize(
    ("restarts", "is_requeued"),
    [({}, True), ({"SLURM_RESTART_COUNT": "1"}, True), ({"SLURM_RESTART_COUNT": "2"}, False)],
)
def test_a_job_is_queued_again_so_often_and_no_more(
    job: Any, scripts: Any, restarts: dict[str, str], is_requeued: bool
) -> None:
    done = job(STATUS="75", MAX_REQUEUES="2", **restarts)
    assert (scripts.folder / "requeued").exists() == is_requeued
    assert ("MAX_REQUEUES=2" in done.stderr) != is_requeued


def test_a_task_of_an_array_queues_again_itself_alone(job: Any, scripts: Any) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "12345", "SLURM_ARRAY_TASK_ID": "2", "STATUS": "75"}
    job("tiny.yaml", "--", "name=a", "--", "name=b", **array)
    assert (scripts.folder / "requeued").read_text() == "requeue 12345_2\n", "12345 is all of them"


def test_a_task_of_an_array_has_its_part_of_the_arguments(job: Any, scripts: Any) -> None:
    arguments = ("tiny.yaml", "seed=1", "--", "name=a", "--", "name=b", "optimizer.lr=1e-4")
    assert job(*arguments, SLURM_ARRAY_TASK_ID="2").returncode == 0
    (started,) = scripts.started()
    assert started.endswith(" tiny.yaml seed=1 name=b optimizer.lr=1e-4")
    outside = job(*arguments, SLURM_ARRAY_TASK_ID="3")
    assert outside.returncode == 2
    assert "the tasks are 1-2" in outside.stderr
