"""scripts/serve.sh with ranks that only listen to signals: a server that is told to end drains, and says so."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]

# What stands for `python -m megatron_ee.server`: its stages, itself alone, and itself under torchrun.
PYTHON = f"""\
#!/usr/bin/env bash
args=("$@")
if [[ "$1 $2 ${{3-}}" == "-m megatron_ee.server --stages" ]]; then
  if [[ "$*" == *wrong* ]]; then echo "wrong: unknown key" >&2; exit 2; fi
  echo "${{STAGES:-1}}"; exit
fi
for place in "${{!args[@]}}"; do
  if [[ ${{args[place]}} == megatron_ee.server ]]; then args[place]=server_of_tests; fi
done
exec "{sys.executable}" "${{args[@]}}"
"""

SERVER = """\
import os, signal, sys, time
from pathlib import Path
from megatron_ee.exit_status import leave_status

rank, heard = int(os.environ.get("RANK", 0)), []
if rank == 0:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: heard.append((number, time.monotonic())))
Path(f"ready{rank}").touch()
if os.environ.get("FAILS") == str(rank):
    Path("ended").touch()
    leave_status(3)
    sys.exit(3)
if rank:
    while not Path("ended").exists():
        time.sleep(0.05)
    sys.exit(0)
drain = float(os.environ.get("DRAIN", 1.2))
while not heard or time.monotonic() - heard[0][1] < drain and signal.SIGINT not in [of for of, _ in heard[1:]]:
    time.sleep(0.05)
Path("heard").write_text(" ".join(signal.Signals(number).name for number, _ in heard))
Path("ended").touch()
leave_status(0)
"""


@contextmanager
def _served(scripts: Any, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The script, once all its ranks listen; ended in any case."""
    scripts.write_program("python", PYTHON)
    (scripts.folder / "server_of_tests.py").write_text(SERVER)
    count = int(environment.get("STAGES", "1"))
    script = subprocess.Popen(
        ["env", "--default-signal=INT", str(ROOT / "scripts/serve.sh"), "serve.yaml", *arguments],
        cwd=scripts.folder,
        env=scripts.environment(PYTHONPATH=str(scripts.folder), **environment),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _wait(lambda: all((scripts.folder / f"ready{rank}").exists() for rank in range(count)), script)
        yield script
    finally:
        left = psutil.Process(script.pid).children(recursive=True) if script.poll() is None else []
        for process in left:
            process.kill()
        script.kill()
        script.communicate()


def _processes_of(script: subprocess.Popen[str]) -> list[psutil.Process]:
    """torchrun and the ranks."""
    return [of for of in psutil.Process(script.pid).children(recursive=True) if of.name() != "sleep"]


def _wait(is_there: Any, script: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not is_there():
        assert time.monotonic() < deadline
        if script.poll() is not None:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("stages", ["1", "2"])
@pytest.mark.parametrize("told", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_server_that_is_told_to_end_drains(scripts: Any, stages: str, told: signal.Signals) -> None:
    with _served(scripts, STAGES=stages) as script:
        processes = _processes_of(script)
        assert len(processes) == (3 if stages == "2" else 0), "torchrun and two ranks"
        started = time.monotonic()
        script.send_signal(told)
        script.communicate(timeout=60)
        assert time.monotonic() - started > 1.1
        assert script.returncode == 0
        first, *more = (scripts.folder / "heard").read_text().split()
        assert first == ("SIGTERM" if stages == "2" else told.name)
        assert "SIGINT" not in more
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive


@pytest.mark.slow
def test_one_that_slurm_tells_with_all_its_processes_drains_too(scripts: Any) -> None:
    """The ranks, torchrun and the script hear it at once."""
    with _served(scripts, STAGES="2") as script:
        for process in [*_processes_of(script), script]:
            process.send_signal(signal.SIGTERM)
        script.communicate(timeout=60)
        assert script.returncode == 0


@pytest.mark.slow
def test_an_interrupt_of_a_terminal_reaches_the_script_alone(scripts: Any) -> None:
    """Which tells the ranks once, as by any other signal; they would take a second one for a wish to end at once."""
    with _served(scripts, STAGES="2") as script:
        os.killpg(script.pid, signal.SIGINT)
        script.communicate(timeout=60)
        assert script.returncode == 0
        assert set((scripts.folder / "heard").read_text().split()) == {"SIGTERM"}


@pytest.mark.slow
def test_a_second_interrupt_ends_answers(scripts: Any) -> None:
    with _served(scripts, STAGES="2", DRAIN="600") as script:
        script.send_signal(signal.SIGINT)
        time.sleep(1.2)
        script.send_signal(signal.SIGINT)
        script.communicate(timeout=30)
        assert script.returncode == 0
        assert (scripts.folder / "heard").read_text().split()[-1] == "SIGINT"


@pytest.mark.slow
def test_a_third_interrupt_ends_the_processes(scripts: Any) -> None:
    with _served(scripts, STAGES="2", DRAIN="600") as script:
        processes = _processes_of(script)
        for process in processes:
            process.send_signal(signal.SIGSTOP)  # they hear nothing
        for _ in range(3):
            script.send_signal(signal.SIGINT)
            time.sleep(1)  # the script looks twice a second
        script.communicate(timeout=30)
        assert script.returncode == 143
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_the_ranks_end_with_is_the_status(scripts: Any, rank: str) -> None:
    with _served(scripts, STAGES="2", FAILS=rank) as script:
        script.communicate(timeout=60)
        assert script.returncode == (3 if rank == "0" else 1)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["wrong=1"], {}, "wrong: unknown key"),
        ([], {"STAGES": "2", "NPROC_PER_NODE": "3"}, "serve.sh: NPROC_PER_NODE: 3 processes do not divide into"),
        ([], {"STAGES": "2", "NNODES": "2"}, "serve.sh: MASTER_ADDR: 2 nodes need the address of node 0"),
    ],
)
def test_what_is_wrong_is_one_message(
    scripts: Any, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    scripts.write_program("python", PYTHON)
    done = scripts.run("serve.sh", "serve.yaml", *arguments, **environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(said)


def test_the_usage_is_complete(scripts: Any) -> None:
    for script, first in (("serve.sh", "Serve a model"), ("decode.sh", "Decode with"), ("train.sh", "Train on")):
        done = scripts.run(script, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(first)
        assert done.stdout.rstrip().endswith("failure.")
        assert scripts.run(script).returncode == 2
