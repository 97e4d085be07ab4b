"""Processes of a bench: what they return, and that none is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PROGRAM = """
import multiprocessing
import os
import sys
import time

import torch.distributed as dist
from bench_ranks import RankError, run_on_ranks


def multiply(factor):
    return factor * dist.get_rank()


def fail_on_the_second(how):
    if dist.get_rank() == 0:
        time.sleep(600)
    if how == "raises":
        raise RankError("there is no room")
    os._exit(3)


if __name__ == "__main__":
    how = sys.argv[1]
    try:
        print(run_on_ranks(2, multiply, 10) if how == "answers" else run_on_ranks(2, fail_on_the_second, how))
    except RankError as error:
        print(error)
    print(len(multiprocessing.active_children()), "left")
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("answers", "[0, 10]"),
        pytest.param("raises", "rank 1: there is no room", marks=pytest.mark.slow),
        pytest.param("dies", "rank 1 died", marks=pytest.mark.slow),
    ],
)
def test_every_rank_answers_or_a_failure_ends_all(tmp_path: Path, how: str, said: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS), str(TOOLS.parent)])}
    command = [sys.executable, str(program), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [said, "0 left"]
