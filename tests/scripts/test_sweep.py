"""Sweeps without SLURM: what is refused, what is started, and what is said of each run."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SWEEP = """\
# three runs
optimizer.lr=1e-3

optimizer.lr=3e-3 'exits.weight_schedule={shape: linear, warmup_iters: 2}' name=steep
  seed=3
"""


def _write(scripts: Any, text: str) -> None:
    (scripts.folder / "sweep.txt").write_text(text)


def _summary(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("sweep.sh: ")]


def test_runs_go_one_after_another_in_folders_of_their_own(scripts: Any) -> None:
    _write(scripts, SWEEP)
    done = scripts.run("sweep.sh", "tiny.yaml", "sweep.txt")
    assert done.returncode == 0, done.stderr
    assert [line.partition(" tiny.yaml ")[2] for line in scripts.started()] == [
        "name=tiny-2 optimizer.lr=1e-3",
        "name=steep optimizer.lr=3e-3 exits.weight_schedule={shape: linear, warmup_iters: 2}",
        "name=tiny-5 seed=3",
    ]
    assert _summary(done.stderr) == [f"sweep.sh: {name}: complete" for name in ("tiny-2", "steep", "tiny-5")]


def test_all_wrong_lines_are_named_and_nothing_starts(scripts: Any) -> None:
    _write(scripts, "seed=1\noptimizr.lr=1\nname=tiny-1\nname='open\n")
    done = scripts.run("sweep.sh", "tiny.yaml", "sweep.txt")
    assert done.returncode == 2
    first, second, third = done.stderr.splitlines()
    assert first.startswith("sweep.txt:2: ")
    assert "did you mean 'optimizer'?" in first
    assert second == "sweep.txt:3: runs/tiny-1 is the folder of line 1 already; give one of them a name="
    assert third == "sweep.txt:4: No closing quotation"
    assert scripts.started() == []


def test_an_empty_sweep_and_a_missing_file_are_refused(scripts: Any) -> None:
    _write(scripts, "# nothing\n\n")
    assert scripts.run("sweep.sh", "tiny.yaml", "sweep.txt").stderr == "sweep.txt: no line with a run\n"
    missing = scripts.run("sweep.sh", "tiny.yaml", "other.txt")
    assert missing.returncode == 2
    assert "other.txt" in missing.stderr


@pytest.mark.slow
def test_a_run_that_fails_does_not_keep_the_others_from_starting(scripts: Any) -> None:
    _write(scripts, "name=broken\nname=stopped\nname=fine\n")
    done = scripts.run("sweep.sh", "tiny.yaml", "sweep.txt")
    assert done.returncode == 1
    assert _summary(done.stderr) == [
        "sweep.sh: broken: failed with status 3",
        "sweep.sh: stopped: saved before its end",
        "sweep.sh: fine: complete",
    ]


@pytest.mark.slow
def test_runs_that_only_stopped_want_to_be_started_again(scripts: Any) -> None:
    _write(scripts, "name=stopped\nname=fine\n")
    assert scripts.run("sweep.sh", "tiny.yaml", "sweep.txt").returncode == 75


def test_a_signal_stops_the_run_that_goes_and_starts_no_other(scripts: Any) -> None:
    _write(scripts, "name=waiting\nname=fine\n")
    command = [str(ROOT / "scripts/sweep.sh"), "tiny.yaml", "sweep.txt"]
    with subprocess.Popen(
        command, cwd=scripts.folder, env=scripts.environment(), stderr=subprocess.PIPE, text=True
    ) as sweep:
        deadline = time.monotonic() + 60
        while not scripts.started():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        sweep.send_signal(signal.SIGTERM)
        _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 75
    assert _summary(said) == ["sweep.sh: waiting: saved before its end", "sweep.sh: fine: not started"]


def test_a_dry_run_prints_the_commands(scripts: Any) -> None:
    _write(scripts, SWEEP)
    done = scripts.run("sweep.sh", "--dry-run", "tiny.yaml", "sweep.txt")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].rstrip() == f"{ROOT}/scripts/train.sh tiny.yaml name=tiny-2 optimizer.lr=1e-3"
    assert scripts.started() == []


def test_a_dry_run_for_slurm_prints_one_array(scripts: Any) -> None:
    _write(scripts, "seed=1\nseed=2\n")
    done = scripts.run("sweep.sh", "--dry-run", "--slurm", "--time=60", "--", "tiny.yaml", "sweep.txt", AT_ONCE="1")
    assert done.stdout.rstrip() == (
        f"sbatch --job-name=sweep --array=1-2%1 --time=60 {ROOT}/scripts/train.slurm tiny.yaml"
        " -- name=tiny-1 seed=1 -- name=tiny-2 seed=2"
    )
