"""`python -m megatron_ee.config` in processes of its own, and what it has in common with the command that trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """\
name: run
model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4}
training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}
"""

WRONG = """\
training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 0}
modle: {}
seed: 1.5
base: base.yaml
exits:
  layers: [4, x]
  weight: [1]
parallel: {tensor: [], layout: [{layers: 4, exit_at_end: true}, {}]}
seed: 2
name: run
"""
WRONG_BASE = "runs: 1\ndevice: 2\n"

# The file in its order, then its base, then overrides.
SAID = [
    "run.yaml:1:51: training.micro_batch_size: 0 must be a positive integer",
    "run.yaml:2:1: modle: unknown key, did you mean 'model'?",
    "run.yaml:3:1: seed: 1.5 is not an integer",
    "run.yaml:6:15: exits.layers.1: 'x' is not an integer",
    "run.yaml:7:3: exits.weight: unknown key, did you mean 'weights'?",
    "run.yaml:8:12: parallel.tensor: [] is not an integer",
    "run.yaml:8:45: parallel.layout.0.exit_at_end: unknown key, did you mean 'exits_at_end'?",
    "run.yaml:8:65: parallel.layout.1.layers: required, but missing",
    "run.yaml:9:1: seed: given twice, first at run.yaml:3:1",
    "base.yaml:1:1: runs: 1 is not a string",
    "base.yaml:2:1: device: 2 must be 'auto', 'cpu' or 'cuda'",
    "override 'checkpoint.interval=x': checkpoint.interval: 'x' is not an integer",
    "override 'serving.x=1': serving.x: unknown key",
    "override 'data=[': while parsing a flow node, expected the node content, but found '<stream end>'",
]


def run_in(
    folder: Path, *arguments: str, module: str = "megatron_ee.config", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=120, check=False)


def test_the_resolved_config_is_printed_and_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    first = run_in(tmp_path, "a.yaml", "seed=3", "exits.layers=[2]")
    assert (first.returncode, first.stderr) == (0, "")
    assert "seed: 3\n" in first.stdout
    assert "  weights: [0.25]\n" in first.stdout
    (tmp_path / "b.yaml").write_text(first.stdout)
    assert run_in(tmp_path, "b.yaml").stdout == first.stdout


def test_the_schema_is_written(tmp_path: Path) -> None:
    assert run_in(tmp_path, "--schema", "schema.json").returncode == 0
    assert json.loads((tmp_path / "schema.json").read_text())["title"] == "Config"
    assert run_in(tmp_path, "a.yaml", "--schema").returncode == 2


@pytest.mark.parametrize("module", ["megatron_ee.config", "megatron_ee.training"])
def test_everything_wrong_is_said_at_once_and_nothing_else(tmp_path: Path, module: str) -> None:
    (tmp_path / "run.yaml").write_text(WRONG)
    (tmp_path / "base.yaml").write_text(WRONG_BASE)
    done = run_in(tmp_path, "run.yaml", "serving.x=1", "data=[", "checkpoint.interval=x", module=module)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", SAID)
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "base.yaml"}


@pytest.mark.parametrize(
    ("line", "ranks", "said"),
    [
        ("device: cuda", "2", "4:1: device: cuda needs a GPU for every local rank; found 2 local ranks, 0 GPUs"),
        ("parallel: {pipeline: 2}", "1", "4:12: parallel.pipeline: 1 process doesn't divide into 2 stages"),
    ],
    ids=["more ranks than GPUs", "too few processes"],
)
def test_where_a_run_cannot_be_trained_it_leaves_nothing_behind(
    tmp_path: Path, line: str, ranks: str, said: str
) -> None:
    (tmp_path / "run.yaml").write_text(GOOD + line)
    environment = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    done = run_in(tmp_path, "run.yaml", module="megatron_ee.training", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"run.yaml:{said}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
