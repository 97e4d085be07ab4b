"""The main road as a user goes it: scripts/train.sh on a YAML, then the decoder on the run, all in real processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import write_small_dataset

ROOT = Path(__file__).parent.parent

CONFIG = """\
name: road
runs: {folder}/runs
device: cpu
model: {{num_layers: 4, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}}
exits: {{layers: [1, 2], weight_schedule: {{warmup_iters: 4}}}}
parallel: {{pipeline: 2}}
data: {{dataset: {folder}/words, folder: {folder}/data, sequence_length: 32}}
training: {{train_iters: 12, global_batch_size: 4, micro_batch_size: 1, eval_interval: 6, eval_iters: 1}}
optimizer: {{lr: 1e-2}}
logging: {{interval: 4}}
"""


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)


def _decode(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, "-m", "megatron_ee.inference", "--checkpoint", str(run), *arguments)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("road")
    write_small_dataset(folder)
    path = folder / "road.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


@pytest.fixture(scope="module")
def trained(config: Path) -> subprocess.CompletedProcess[str]:
    done = _run(str(ROOT / "scripts/train.sh"), str(config))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(config: Path, trained: subprocess.CompletedProcess[str]) -> Path:
    return config.parent / "runs/road"


def test_training_prints_one_line_per_interval(trained: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in trained.stderr.splitlines() if "/12  loss" in line]
    assert [re.search(r"(\d+)/12", line).group(1) for line in lines] == ["4", "8", "12"]  # type: ignore[union-attr]
    assert all("exit 1:" in line and "exit 2:" in line and "final:" in line and "left" in line for line in lines)
    assert "Traceback" not in trained.stderr
    assert "Warning" not in trained.stderr


def test_the_run_folder_holds_the_record(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [4, 6, 8, 12, 12]
    validations = [record for record in records if "val/loss" in record]
    for layer in (1, 2, 4):
        assert validations[-1][f"val/exit_{layer}/loss"] < validations[0][f"val/exit_{layer}/loss"]
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints/latest/format.json").is_file()


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(config: Path, run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    done = _run(str(ROOT / "scripts/train.sh"), str(config))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert (run / "metrics.jsonl").read_text() == before


def test_decoding_prints_text_and_what_exits_did(run: Path) -> None:
    done = _decode(run, "--prompt", "early ", "inference.sampling.max_new_tokens=12", "inference.exit.threshold=0.2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("early ")
    assert re.search(r"^tokens +12 in 1 text, \d+\.\d tokens/s$", done.stdout, re.MULTILINE)
    assert re.search(r"^mean depth +\d\.\d\d of 4 layers$", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_comparing_starts_from_full_depth(run: Path) -> None:
    done = _decode(run, "--prompt", "early ", "--compare", "inference.sampling.max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert rows[1].split()[:4] == ["full", "depth", "4.00", "100.0%"]
    assert rows[-1].split()[:3] == ["speculative", "4.00", "100.0%"]
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no-run", "--prompt", "a"], "checkpoint: no-run is not a folder"),
        (["--prompt", "a", "inference.exit.treshold=0.5"], "did you mean 'threshold'?"),
        (["--prompt", "a", "inference.exit.exits=[3]"], "there is no exit after layer 3, only after [1, 2]"),
    ],
    ids=["no run", "typo", "no such exit"],
)
def test_what_a_user_got_wrong_is_one_message(run: Path, arguments: list[str], message: str) -> None:
    done = _decode(run, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_config_never_reaches_torchrun(config: Path) -> None:
    done = _run(str(ROOT / "scripts/train.sh"), str(config), "model.num_layrs=3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "override 'model.num_layrs=3': model.num_layrs: unknown key, did you mean 'num_layers'?"
    ]
