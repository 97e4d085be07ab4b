"""Checkpoints of whole models: names on disk, another model refused, a killed save harmless."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import whole_model
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from megatron.core import dist_checkpointing

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.build import build_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_small_dataset(folder)
    return folder


def _train_two(config: Any) -> None:
    train(config, until=2, save=True)


@pytest.fixture(scope="module")
def step(folder: Path, ranks: RankPool) -> Path:
    config = run_config(folder, name="two-stages", parallel={"pipeline": 2}, exits={"projection": "own"})
    ranks.run(2, _train_two, config)
    newest = newest_checkpoint(folder / "runs/two-stages")
    assert newest is not None
    return newest


def test_parameters_have_global_names_whatever_the_layout(step: Path) -> None:
    names = {name for name in dist_checkpointing.load_tensors_metadata(str(step)) if "optimizer" not in name}
    layer_parts = (
        "input_layernorm",
        "self_attention.linear_proj",
        "self_attention.linear_qkv",
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    expected = {f"layers.{layer}.{part}.weight" for layer in range(1, 9) for part in layer_parts}
    expected |= {f"exits.{layer}.{part}.weight" for layer in (2, 5) for part in ("norm", "output")}
    assert names == expected | {"embedding.weight", "norm.weight", "output.weight"}


def test_the_resolved_config_and_all_files_digests_are_inside(step: Path) -> None:
    described = json.loads((step / "format.json").read_text())
    present = {path.name for path in step.iterdir()} - {"format.json"}
    assert set(described["files"]) == present
    assert "config.yaml" in present
    assert described["consumed_samples"] == 8


def _resume(config: Any) -> str:
    try:
        build_trainer(config, choose_device("cpu"))
    except UserError as error:
        return str(error)
    return "resumed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": {"layers": [2, 6], "projection": "own"}}, "exits.layers is (2, 5), not (2, 6)"),
        ({"exits": {"projection": "shared"}}, "exits.projection is own, not shared"),
        ({"model": {"ffn_hidden_size": 64}, "exits": {"projection": "own"}}, "model.ffn_hidden_size is 48, not 64"),
        ({"exits": {"projection": "own"}, "checkpoint": {"resume": False}}, "checkpoint.resume: is false, but"),
        ({"exits": {"projection": "own"}}, "resumed"),
    ],
    ids=["exits", "projection", "width", "resume off", "same"],
)
def test_a_run_goes_on_from_its_own_model_only(
    folder: Path, ranks: RankPool, step: Path, changes: dict[str, Any], message: str
) -> None:
    config = run_config(folder, name="two-stages", parallel={"pipeline": 2}, **changes)
    for answer in ranks.run(2, _resume, config):
        assert message in answer


def test_a_killed_save_is_overwritten(folder: Path, ranks: RankPool) -> None:
    config = run_config(folder, name="killed")
    left_over = folder / "runs/killed/checkpoints/step_00000002"
    left_over.mkdir(parents=True)
    (left_over / "__0_9.distcp").write_text("half")
    ranks.run(1, _train_two, config)
    assert newest_checkpoint(folder / "runs/killed") == left_over
    assert not (left_over / "__0_9.distcp").exists()


def _save_twice(config: Any) -> tuple[float, float]:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    trainer.train(until=1)
    written = (trainer.save() / "format.json").stat().st_mtime_ns
    return written, (trainer.save() / "format.json").stat().st_mtime_ns


def test_a_step_that_is_saved_is_not_written_again(folder: Path, ranks: RankPool) -> None:
    ((first, second),) = ranks.run(1, _save_twice, run_config(folder, name="twice"))
    assert first == second


def test_a_stage_takes_all_of_its_parameters_and_nothing_else(mesh: Mesh) -> None:
    stage = whole_model(mesh, exits=[2])
    state = dict(stage.state_dict())
    stage.load_sharded({**state, "layers.1.self_attention.linear_qkv._extra_state": torch.empty(0)})
    for wrong in ({}, {**state, "layers.9.weight": torch.empty(1)}):
        with pytest.raises(AssertionError, match="not in both the stage and the checkpoint"):
            stage.load_sharded(wrong)
