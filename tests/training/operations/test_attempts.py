"""Attempts number themselves, and say how they ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ee.training.operations.attempts import STOPPED, newest_outcome, open_attempt


def _open(run: Path, number: int) -> None:
    attempt = open_attempt(run, config=f"name: {number}\n", environment={"python": "3"})
    assert attempt.folder == run / "attempts" / str(number)


def test_numbers_go_up_and_outcomes_are_the_newest_ones(tmp_path: Path) -> None:
    assert newest_outcome(tmp_path) == (0, None)
    for number in range(1, 12):
        _open(tmp_path, number)
        assert newest_outcome(tmp_path) == (number, None), "what an earlier one left doesn't count"
        attempt = tmp_path / "attempts" / str(number)
        assert (attempt / "config.yaml").read_text() == f"name: {number}\n"
        assert json.loads((attempt / "environment.json").read_text())["python"] == "3"
        open_attempt_outcome = attempt / "outcome.json"
        open_attempt_outcome.write_text(json.dumps({"exit_status": number}))
        assert newest_outcome(tmp_path) == (number, number)


def test_an_outcome_is_whole_and_says_why(tmp_path: Path) -> None:
    attempt = open_attempt(tmp_path, config="", environment={})
    attempt.end(STOPPED, "SIGUSR1", iteration=7)
    outcome = json.loads((attempt.folder / "outcome.json").read_text())
    assert (outcome["exit_status"], outcome["reason"], outcome["iteration"]) == (75, "SIGUSR1", 7)
    assert {path.name for path in attempt.folder.iterdir()} == {"config.yaml", "environment.json", "outcome.json"}


@pytest.mark.parametrize("ended", [False, True])
def test_the_command_prints_number_and_status(tmp_path: Path, ended: bool) -> None:
    attempt = open_attempt(tmp_path, config="", environment={})
    if ended:
        attempt.end(STOPPED, "SIGTERM", iteration=1)
    command = [sys.executable, "-m", "megatron_ee.training.operations.attempts", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["1", "75" if ended else "-"]


def test_the_command_needs_a_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ee.training.operations.attempts"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "run" in refused.stderr and "Traceback" not in refused.stderr
    started_never = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert started_never.stdout.split() == ["0", "-"]
