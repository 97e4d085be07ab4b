"""What can be known of the images without building them: what they copy is there, and what they start works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _start(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts/entrypoint.sh"), *arguments]
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_file_that_is_copied_exists() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for line in copies for name in line.split()]
    assert "pyproject.toml" in names
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_script_that_is_run_can_be() -> None:
    scripts = set(re.findall(r"\bscripts/\w+\.sh", (ROOT / "Dockerfile").read_text()))
    assert scripts == {"scripts/entrypoint.sh", "scripts/install_image.sh", "scripts/serve.sh"}
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0)])
def test_the_entry_point_reports_and_goes_on_to_train(arguments: list[str], status: int) -> None:
    started = _start(*arguments)
    assert started.returncode == status, started.stderr
    assert re.search(r"^torch +\d", started.stderr, re.MULTILINE)
    usage = started.stderr if status else started.stdout
    assert "scripts/train.sh CONFIG" in usage
    assert not re.search(r"^torch +\d", started.stdout, re.MULTILINE), "stdout is train.sh's alone"


def test_a_report_that_fails_stops_nothing() -> None:
    started = _start("--help", python="false")
    assert started.returncode == 0
    assert "no report" in started.stderr
    assert "scripts/train.sh CONFIG" in started.stdout
