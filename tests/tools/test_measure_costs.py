"""Measured costs of a tiny model, and what they are good for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import tiny_config

from megatron_ee.config import load_config, to_yaml
from megatron_ee.errors import UserError
from megatron_ee.parallel.chunks import Chunk
from megatron_ee.parallel.costs import costs_of
from megatron_ee.parallel.layout import layout_of
from tools.measure_costs import costs_from, main, parts_of, table

ROOT = Path(__file__).parents[2]
OVERRIDES = ("model.vocab_size=320", "data.sequence_length=128", "model.hidden_size=64", "parallel.pipeline=2")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny_config()))
    return path


def test_a_layout_is_made_by_what_was_measured(run: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/measure_costs.py"), "run.yaml", *OVERRIDES, "--output", "new/c.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "written to new/c.json" in done.stdout
    assert json.loads(Path("new/c.json").read_text())["device"] == "CPU"
    config = load_config("run.yaml", [*OVERRIDES, "parallel.costs=new/c.json"])
    costs = costs_of(config, 320)
    assert costs.exits.keys() == {"norm"}
    assert all(0 < seconds < 1 for seconds in (costs.layer, costs.embedding, *costs.exits.values()))
    assert sum(chunk.stop - chunk.start for (chunk,) in layout_of(config, 320)) == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["parallel.tensor=2", "--output", "costs.json"],
            "override 'parallel.tensor=2': parallel.tensor: 2 ranks share each matrix, but costs are measured by one "
            "process",
        ),
        (["--output", "run.yaml/costs.json"], "--output: run.yaml/costs.json cannot be written: File exists"),
        (["--output", "."], "--output: . is a folder, not a file"),
        (
            ["model.sliding_window=4", "model.sliding_window_layers=[1]", "--output", "costs.json"],
            "override 'model.sliding_window_layers=[1]': model.sliding_window_layers: makes layers of two kinds, but "
            "costs are measured of one",
        ),
    ],
    ids=["tensor parallel", "below a file", "a folder", "two kinds of layers"],
)
def test_what_cannot_be_measured_or_written_is_said_at_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_costs.py", run.name, *arguments])
    assert main() == 2
    assert capsys.readouterr() == ("", f"{said}\n")
    assert list(run.parent.iterdir()) == [run]


def test_each_head_that_the_config_uses_has_a_chunk() -> None:
    config, chunks = parts_of(tiny_config(exits={"layers": [2, 3, 5], "head": ["mlp", "norm", "block"]}))
    assert chunks == (Chunk(0, 1, (1,)), Chunk(1, 2, (2,)), Chunk(2, 5, (5,)))
    assert [config.exits.head_of(layer) for layer in (1, 2, 5)] == ["block", "mlp", "norm"]
    assert config.model.num_layers == 5
    assert parts_of(tiny_config())[1] == (Chunk(0, 1, ()), Chunk(1, 4, (4,)))


def test_costs_are_medians() -> None:
    names = ("layer_forward", "layer_backward", "embedding_forward", "embedding_backward", "exit_norm")
    seconds = {name: [1.0, 3.0 + number, 9.0] for number, name in enumerate(names)}
    costs = costs_from(seconds)
    assert (costs.layer_forward, costs.embedding_backward, costs.exits, costs.transfer) == (
        3.0,
        6.0,
        {"norm": 7.0},
        0.0,
    )
    assert "exit norm             7000.000  1000.000  9000.000      1.00" in table(seconds, costs)
    with pytest.raises(UserError, match="noise"):
        costs_from({**seconds, "layer_forward": [-1.0, 0.0, 2.0]})
