"""Attempts number themselves, and say how they ended."""

import json
from pathlib import Path

from megatron_ee.training.operations.attempts import STOPPED, open_attempt


def _open(run: Path, number: int) -> None:
    attempt = open_attempt(run, config=f"name: {number}\n", environment={"python": "3"})
    assert attempt.folder == run / "attempts" / str(number)


def test_numbers_go_up_and_no_start_overwrites_another(tmp_path: Path) -> None:
    for number in range(1, 12):
        _open(tmp_path, number)
        attempt = tmp_path / "attempts" / str(number)
        assert (attempt / "config.yaml").read_text() == f"name: {number}\n"
        assert json.loads((attempt / "environment.json").read_text())["python"] == "3"


def test_an_outcome_is_whole_and_says_why(tmp_path: Path) -> None:
    attempt = open_attempt(tmp_path, config="", environment={})
    attempt.end(STOPPED, "SIGUSR1", iteration=7)
    outcome = json.loads((attempt.folder / "outcome.json").read_text())
    assert (outcome["exit_status"], outcome["reason"], outcome["iteration"]) == (75, "SIGUSR1", 7)
    assert {path.name for path in attempt.folder.iterdir()} == {"config.yaml", "environment.json", "outcome.json"}
