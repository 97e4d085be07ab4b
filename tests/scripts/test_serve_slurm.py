"""scripts/serve.slurm without SLURM: what it would submit, and a job's step with programs that stand for SLURM's."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "scripts/serve.slurm"

PYTHON = f"""\
#!/usr/bin/env bash
if [[ "$1 $2 ${{3-}}" == "-m megatron_ee.server --stages" ]]; then
  if [[ "$*" == *wrong* ]]; then echo "wrong: unknown key" >&2; exit 2; fi
  echo "$*" >asked; echo 1; exit
fi
if [[ "$1 $2" == "-m megatron_ee.server" ]]; then echo "$*" >served; exec ${{SERVER:-true}}; fi
exec "{sys.executable}" "$@"
"""

SCONTROL = f"""\
#!/usr/bin/env bash
case "$1 $2" in
  "show job") printf '   JobState=RUNNING\\n   Command=%s serve.yaml\\n' "{LAUNCHER}" ;;
  "show hostnames") echo n7 ;;
  "show node") echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=$3" ;;
esac
"""

SRUN = """\
#!/usr/bin/env bash
if [[ $1 == --help ]]; then exit; fi
echo "$*" >step
while [[ $1 == -* ]]; do shift; done
export SLURM_NODEID=0
echo $$ >task
exec "$@"
"""

SCANCEL = """\
#!/usr/bin/env bash
echo "$*" >>told
kill "$(cat task)"
"""

JOB = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n7"}


@pytest.fixture
def job(scripts: Any) -> Path:
    """The launcher as a job's node has it."""
    for name, text in (("python", PYTHON), ("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
        scripts.write_program(name, text)
    return Path(shutil.copy(LAUNCHER, scripts.folder / "slurm_script"))


def test_a_dry_run_prints_what_it_would_submit(job: Path, scripts: Any) -> None:
    done = scripts.run("serve.slurm", "--dry-run", "--gpus-per-node=1", "--", "serve.yaml", "--model", "a b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"sbatch --gpus-per-node=1 {LAUNCHER} serve.yaml --model 'a b'"
    assert "#SBATCH --signal=B:USR1@90" in lines
    assert lines[-1].startswith("srun --nodes=$SLURM_NNODES ")
    assert lines[-1].endswith(f"{ROOT}/scripts/serve.sh serve.yaml --model 'a b'")
    assert (scripts.folder / "asked").read_text() == "-m megatron_ee.server --stages serve.yaml --model a b\n"


def test_a_model_needs_no_options_and_no_config(job: Path, scripts: Any) -> None:
    done = scripts.run("serve.slurm", "--dry-run", "--model", "runs/demo")
    assert done.stdout.splitlines()[0] == f"sbatch {LAUNCHER} --model runs/demo"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve.yaml", "wrong=1"], "wrong: unknown key"),
        (["--nodes=2", "serve.yaml"], "serve.slurm: a -- ends sbatch's options"),
        (["--nodes=2", "--"], "serve.slurm: which CONFIG or --model?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    job: Path, scripts: Any, arguments: list[str], said: str
) -> None:
    scripts.write_program("sbatch", "#!/bin/sh\ntouch submitted\n")
    done = scripts.run("serve.slurm", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert not (scripts.folder / "submitted").exists()


def test_a_job_says_where_it_listens(job: Path, scripts: Any) -> None:
    done = scripts.run(job, "serve.yaml", "--model", "runs/demo", **JOB)
    assert done.returncode == 0, done.stderr
    assert "listens at port 8345 of 10.0.0.7" in done.stderr
    assert "ssh -L 8345:127.0.0.1:8345 10.0.0.7" in done.stderr
    served = (scripts.folder / "served").read_text()
    assert served == "-m megatron_ee.server serve.yaml --model runs/demo serving.port=8345\n"
    done = scripts.run(job, "serve.yaml", "serving.port=9000", **JOB)
    assert "listens at port 9000 of 10.0.0.7" in done.stderr
    assert (scripts.folder / "served").read_text() == "-m megatron_ee.server serve.yaml serving.port=9000\n"


@pytest.mark.parametrize("told", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_end_lets_the_server_end(job: Path, scripts: Any, told: signal.Signals) -> None:
    server = scripts.folder / "bin/server"
    scripts.write_program(
        "server", "#!/usr/bin/env bash\ntrap 'exit 0' TERM\ntouch ready\nwhile sleep 0.1; do :; done\n"
    )
    environment = scripts.environment(SERVER=str(server), **JOB)
    with subprocess.Popen(
        [str(job), "serve.yaml"], cwd=scripts.folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (scripts.folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(told)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (scripts.folder / "told").read_text() == "--signal=TERM 12345.0\n"
    assert f"{told.name.removeprefix('SIG')}: no more requests" in said


def test_a_container_mounts_the_repository_and_the_folder(job: Path, scripts: Any) -> None:
    image = {"CONTAINER_IMAGE": "megatron_ee.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    done = scripts.run("serve.slurm", "--dry-run", "serve.yaml", **image)
    step = done.stdout.splitlines()[-1]
    assert "--container-image=megatron_ee.sqsh" in step
    assert f"--container-mounts={ROOT}:{ROOT},{scripts.folder}:{scripts.folder},/data:/data" in step
    done = scripts.run(job, "serve.yaml", **image, **JOB)
    assert (done.returncode, done.stderr.startswith("serve.slurm: CONTAINER_IMAGE: ")) == (2, True)


def test_the_usage_is_complete(scripts: Any) -> None:
    said = scripts.run("serve.slurm", "--help").stdout
    assert said.startswith("Serve a model as a SLURM job")
    assert said.rstrip().endswith("scripts/serve.sh.")
    assert "SBATCH --" not in said
