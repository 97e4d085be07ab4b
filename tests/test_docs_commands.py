"""Every command of the pages is run as it stands there, in a folder that looks like the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"^\*\*`([^`]+)`\*\*", re.MULTILINE)

# The demo's config, with a model that is trained in a second.
CONFIG = """\
name: demo
model: {num_layers: 4, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}
exits: {layers: [1, 2], weight_schedule: {warmup_iters: 4}}
parallel: {pipeline: 2}
data: {sequence_length: 32}
training: {train_iters: 8, global_batch_size: 16, micro_batch_size: 1, eval_iters: 1}
checkpoint: {interval: 4}
logging: {interval: 2}
"""

# What stands for the other configs, on that model.
MORE_CONFIGS = {
    "train/gates.yaml": "{base: demo.yaml, name: gates, exits: {gate: linear}}",
    "tune/exits.yaml": """\
base: ../train/demo.yaml
name: demo-exits
checkpoint: {initial: runs/demo}
exits: {layers: [1, 3]}
training: {trains: exits}
""",
    "sft/demo.yaml": """\
base: ../train/demo.yaml
name: sft-demo
checkpoint: {initial: runs/demo}
data:
  format: messages
  dataset: runs/data/functions/train.jsonl
  validation: runs/data/functions/valid.jsonl
  sequence_length: 768
""",
}

SLOW = (
    "calibration",
    "recipes",
    "huggingface",
    "operations",
    "decoding",
    "evaluation",
)  # many runs and programs, which other tests call without starting them

SBATCH = """#!/bin/sh
echo "$@" >> submitted
"""

# Commands whose runs are like others of the page, or servers, which do not end: they are started by an interpreter that
# has neither.
WITHOUT_RANKS = ("scripts/sweep.sh configs/", "MAX_RESTARTS=3 ", "scripts/serve.sh")
PYTHON = f"""#!/bin/sh
if [ "$1 $2" = "-m torch.distributed.run" ]; then echo "$@" >> started; exit; fi
if [ "$1 $2" = "-m megatron_ee.server" ] && [ "$3" != "--stages" ]; then echo "$@" >> started; exit; fi
exec "{sys.executable}" "$@"
"""


def _commands(page: Path) -> list[str]:
    return [line for block in COMMANDS.findall(page.read_text()) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in ("configs", "runs", ".git"):
            (folder / path.name).symlink_to(path)
    (folder / "configs/train").mkdir(parents=True)
    (folder / "configs/train/demo.yaml").write_text(CONFIG)
    for path, text in MORE_CONFIGS.items():
        (folder / "configs" / path).parent.mkdir(exist_ok=True)
        (folder / "configs" / path).write_text(text)
    (folder / "configs/serve").symlink_to(ROOT / "configs/serve")
    (folder / "configs/published").symlink_to(ROOT / "configs/published")
    (folder / "bin").mkdir()
    (folder / "bin/sbatch").write_text(SBATCH)  # what a real one does with it: tests/slurm
    (folder / "bin/sbatch").chmod(0o755)
    (folder / "bin/without-ranks").write_text(PYTHON)
    (folder / "bin/without-ranks").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
        for page in PAGES
        if _commands(page)
    ],
)
def test_every_command_does_what_it_should(page: Path, checkout: Path) -> None:
    path = f"{checkout / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for command in _commands(page):
        python = str(checkout / "bin/without-ranks") if command.startswith(WITHOUT_RANKS) else sys.executable
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=checkout,
            env={**environment, "PYTHON": python},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"


def test_what_they_submit_is_a_job_and_an_array(checkout: Path) -> None:
    """After the commands of the page on operations."""
    if not (checkout / "submitted").exists():
        pytest.skip("the commands were not run")
    job, array, server = (checkout / "submitted").read_text().splitlines()
    assert "--nodes=4 --gpus-per-node=8 --time=12:00:00" in job
    assert "--array=1-2%1" in array
    assert "--gpus-per-node=1 " in server and server.endswith("scripts/serve.slurm configs/serve/demo.yaml")
    first, second, alone, *servers = (checkout / "started").read_text().splitlines()
    assert "optimizer.lr=1e-3" in first and "name=fast" in second and "name=steady" in alone
    assert servers[0] == "-m megatron_ee.server configs/serve/demo.yaml"
    assert servers[1].startswith("-m megatron_ee.server --model runs/demo ")


def test_quoted_messages_are_those_of_the_code() -> None:
    sources = [*(ROOT / "megatron_ee").rglob("*.py"), *(ROOT / "scripts").iterdir()]
    code = "\n".join(path.read_text() for path in sources)
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = [part.strip() for message in QUOTED.findall(page) for part in message.split("…") if part.strip()]
    assert len(quoted) > 10
    assert [part for part in quoted if part not in code] == []
