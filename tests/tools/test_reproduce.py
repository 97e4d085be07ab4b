"""The results in miniature, from nothing to the page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/reproduce.py"


def _reproduce(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)


def test_the_budget_names_every_config_and_starts_nothing(tmp_path: Path) -> None:
    done = _reproduce("--budget", "--folder", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "none                     3         600     2,457,600" in done.stdout
    assert "in all 41 runs" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at-once", "0"], "--at-once: 0 is below 1"),
        (["--only", "nine"], "--only: there is no run 'nine', and nothing of that name is measured"),
        (["--books", "nowhere.jsonl"], "nowhere.jsonl: not a .jsonl of objects with `title` and `text`"),
        (["--quick", "--books", "x.jsonl"], "--quick is on the built-in corpus, without --books"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = _reproduce(*arguments, "--folder", tmp_path)
    assert (done.returncode, message in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    assert not (tmp_path / "results").exists()


def test_what_is_named_is_measured_and_nothing_trained(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = _reproduce("--quick", "--only", "costs", "--folder", tmp_path / "runs", "--output", results)
    assert done.returncode == 0, done.stderr
    assert "no page yet: there are no figures of " in done.stdout
    assert [path.name for path in results.iterdir()] == ["costs.json"]
    assert set(json.loads((results / "costs.json").read_text())["steps"]) > {"every_second", "layerskip"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["data"]


@pytest.mark.parametrize("content", ["", '[{"measure": "full'])
def test_figures_that_are_none_are_named(tmp_path: Path, content: str) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "decode.json").write_text(content)
    done = _reproduce("--page", "--output", results, "--folder", tmp_path / "runs")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{results}/decode.json: cannot be read as JSON (")


@pytest.mark.slow
def test_all_of_it_in_miniature(tmp_path: Path) -> None:
    arguments = ("--quick", "--at-once", 2, "--folder", tmp_path, "--output", tmp_path / "results")
    done = _reproduce(*arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "results/runs.json").read_text())["runs"]
    assert len(runs) == 19
    assert all(run["iterations"] in (1, 6) for run in runs.values())
    assert {cell["draft_exit"] for cell in runs["gates-1"]["drafting"]} == {2, 4, 6, "auto"}
    assert (tmp_path / "results.md").read_text().startswith("# Results")
    again = _reproduce(*arguments)
    assert again.returncode == 0 and "gates-1" in again.stdout, "what is there is kept, and takes seconds"
