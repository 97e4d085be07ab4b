"""`python -m megatron_ee.config` in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

GOOD = """\
name: run
model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4}
training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}
"""


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ee.config", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_resolved_config_is_printed_and_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    first = run_in(tmp_path, "a.yaml", "seed=3", "exits.layers=[2]")
    assert (first.returncode, first.stderr) == (0, "")
    assert "seed: 3\n" in first.stdout
    assert "  weights: [0.25]\n" in first.stdout
    (tmp_path / "b.yaml").write_text(first.stdout)
    assert run_in(tmp_path, "b.yaml").stdout == first.stdout


def test_problems_are_explained_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {num_layrs: 2}\n" + GOOD.replace("model:", "serving:"))
    wrong = run_in(tmp_path, "a.yaml")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "a.yaml:1:9: model.num_layrs: unknown key, did you mean 'num_layers'?\n" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_schema_is_written(tmp_path: Path) -> None:
    assert run_in(tmp_path, "--schema", "schema.json").returncode == 0
    assert json.loads((tmp_path / "schema.json").read_text())["title"] == "Config"
    assert run_in(tmp_path, "a.yaml", "--schema").returncode == 2
