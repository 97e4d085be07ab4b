"""The scripts with a torchrun that only says how it was started, and ends as the run's name asks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CONFIG = """\
name: tiny
device: cpu
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
exits: {layers: [1]}
parallel: {pipeline: 2}
training: {train_iters: 2, global_batch_size: 16, micro_batch_size: 1}
"""

# The interpreter, but for torchrun: its arguments go into started, a line each start, its environment into environment.
PYTHON = f"""\
#!/usr/bin/env bash
if [[ "$1 $2" != "-m torch.distributed.run" ]]; then exec "{sys.executable}" "$@"; fi
echo "$*" >>started
env >environment
case "$*" in
  *name=broken*) exit 3 ;;
  *name=stopped*) exit 75 ;;
  *name=waiting*) exec sleep 60 ;;
esac
"""


class Scripts:
    """Starts scripts in a folder of its own, which holds tiny.yaml."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(CONFIG)
        self.write_program("python", PYTHON)

    def write_program(self, name: str, text: str) -> None:
        """A program that the scripts find before any other."""
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def environment(self, **changes: str) -> dict[str, str]:
        """Without what the outside would add to it."""
        outside = ("SLURM_", "SBATCH_", "OMP_", "PYTORCH_", "CUDA_", "CONTAINER_", "NPROC_", "MASTER_", "RDZV_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
        path = f"{self.folder / 'bin'}:{kept['PATH']}"
        return {**kept, "PATH": path, "PYTHON": str(self.folder / "bin/python"), **changes}

    def run(self, script: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One of scripts/, by its name, or another by its path."""
        return subprocess.run(
            [str(ROOT / "scripts" / script), *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def started(self) -> list[str]:
        """The command lines that torchrun was started with."""
        path = self.folder / "started"
        return path.read_text().splitlines() if path.exists() else []

    def environment_of_ranks(self) -> dict[str, str]:
        """Of the last ones."""
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)
