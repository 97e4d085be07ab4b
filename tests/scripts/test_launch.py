"""What the launchers ask of torchrun: only what the installed one knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "scripts/launch.sh"
ASK = 'source "$1"; launch=(--standalone); leave_ranks_alone 7; echo "${launch[@]}"'


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        (["--nnodes"], "--standalone"),
        (["--nnodes", "--signals-to-handle"], "--standalone --signals-to-handle SIGQUIT"),
        (
            ["--nnodes", "--signals-to-handle", "--shutdown-timeout"],
            "--standalone --signals-to-handle SIGQUIT --shutdown-timeout 7",
        ),
    ],
    ids=["2.8", "2.11", "2.13"],
)
def test_an_older_torchrun_is_not_told_what_it_does_not_know(tmp_path: Path, known: list[str], asked: str) -> None:
    folder = tmp_path / "torch/distributed"
    folder.mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    (folder / "run.py").write_text("".join(f'parser.add_argument("{option}")\n' for option in known))
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = ["bash", "-euo", "pipefail", "-c", ASK, "train.sh", str(LAUNCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, asked), done.stderr
