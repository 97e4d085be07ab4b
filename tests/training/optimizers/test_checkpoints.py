"""The optimizer's state in checkpoints: a run goes on as if nothing had been, whichever backend began it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_ee.checkpoint.sharded import model_state
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer

PP2 = {"pipeline": 2}  # with two data ranks
OFFLOAD = {"deepspeed": {"offload": "cpu"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizers")
    write_small_dataset(folder)
    return folder


def _config(folder: Path, name: str, backend: str, precision: str = "fp32", **changes: Any) -> Config:
    settings = {"backend": backend, "no_weight_decay": ["embedding.*"], **changes.pop("optimizer", {})}
    changes = {"parallel": PP2, **changes}
    return run_config(folder, name=name, training={"precision": precision}, optimizer=settings, **changes)


def _two(config: Config) -> None:
    train(config, until=2, save=True)


def _four(config: Config) -> None:
    train(config, until=4, save=True)


def _assert_near(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], atol: float) -> None:
    """Of all stages together, whatever the layout: tensor-parallel ranks have parts, and are not for this."""
    measured, expected = (
        {name: value for result in results for name, value in result["parameters"].items()}
        for results in (ours, theirs)
    )
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, atol=atol, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, ranks: RankPool) -> list[dict[str, Any]]:
    return ranks.run(4, train, _config(folder, "whole", "deepspeed"))


@pytest.fixture(scope="module")
def stopped(folder: Path, ranks: RankPool) -> Path:
    """A run of DeepSpeed on four ranks that has made two of six iterations."""
    ranks.run(4, _two, _config(folder, "stopped", "deepspeed"))
    return folder / "runs/stopped"


@pytest.mark.parametrize(
    ("world_size", "backend", "changes", "atol"),
    [
        (4, "deepspeed", {}, 0.0),
        (1, "torch", {"parallel": {}}, 1e-6),
        pytest.param(2, "megatron", {"parallel": {"distributed_optimizer": True}}, 1e-6, marks=pytest.mark.slow),
        pytest.param(2, "deepspeed", {"parallel": {}, "optimizer": OFFLOAD}, 1e-6, marks=pytest.mark.slow),
        pytest.param(4, "deepspeed", {"parallel": {"pipeline": 4}}, 1e-6, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_deepspeed_began_goes_on(
    folder: Path,
    ranks: RankPool,
    uninterrupted: list[dict[str, Any]],
    stopped: Path,
    world_size: int,
    backend: str,
    changes: dict[str, Any],
    atol: float,
) -> None:
    """As the same run to the bit; under another backend and in another layout within rounding."""
    config = _config(folder, f"{backend}-on-{world_size}-{len(changes)}", backend, **changes)
    shutil.copytree(stopped, folder / "runs" / config.name, symlinks=True)
    resumed = ranks.run(world_size, train, config)
    assert {result["started_at"] for result in resumed} == {2}
    _assert_near(resumed, uninterrupted, atol)


def test_backends_go_on_from_each_other(folder: Path, ranks: RankPool, uninterrupted: list[dict[str, Any]]) -> None:
    """megatron, torch and deepspeed train two iterations each, in three layouts."""
    ranks.run(4, _two, _config(folder, "turns", "megatron", parallel={**PP2, "distributed_optimizer": True}))
    ranks.run(2, _four, _config(folder, "turns", "torch", parallel={"tensor": 2}))
    resumed = ranks.run(4, train, _config(folder, "turns", "deepspeed"))
    assert {result["started_at"] for result in resumed} == {4}
    _assert_near(resumed, uninterrupted, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "precision", "optimizer"),
    [("deepspeed", "fp16", OFFLOAD), ("deepspeed", "bf16", {}), ("torch", "fp16", {})],
    ids=str,
)
def test_a_resumed_run_in_half_precision_is_the_uninterrupted_one(
    folder: Path, ranks: RankPool, backend: str, precision: str, optimizer: dict[str, Any]
) -> None:
    whole = ranks.run(4, train, _config(folder, f"{backend}-{precision}", backend, precision, optimizer=optimizer))
    config = _config(folder, f"{backend}-{precision}-in-parts", backend, precision, optimizer=optimizer)
    ranks.run(4, _two, config)
    resumed = ranks.run(4, train, config)
    assert {result["started_at"] for result in resumed} == {2}
    _assert_near(resumed, whole, atol=0.0)


def _state(config: Config) -> dict[str, Any]:
    """What the optimizer holds once a run is resumed."""
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    state = trainer.optimizer.sharded_state_dict(model_state(trainer.stage, trainer.mesh))
    tensors = {}
    for name, kinds in state["tensors"].items():
        apply_factories(kinds)
        for shard in nested_values(kinds):
            tensors[name, shard.key, shard.global_offset] = shard.data.numpy().copy()
    return {"tensors": tensors, "step": state["step"], "grad_scaler": state["grad_scaler"]}


@pytest.mark.slow
def test_all_backends_take_the_same_from_a_checkpoint(folder: Path, ranks: RankPool) -> None:
    """fp16: moments, fp32 copies, the step and the loss scale, to the bit."""
    settings = {"initial_loss_scale": 2.0**28}  # the first step overflows
    ranks.run(4, _two, _config(folder, "fp16", "megatron", "fp16", optimizer=settings))
    states = {}
    for backend, optimizer in (("megatron", {}), ("torch", {}), ("deepspeed", {}), ("deepspeed", OFFLOAD)):
        config = _config(folder, "fp16", backend, "fp16", optimizer=optimizer)
        states[f"{backend}-{len(optimizer)}"] = ranks.run(4, _state, config)
    expected = states.pop("megatron-0")
    assert expected[0]["grad_scaler"]["scale"] < 2.0**28
    for backend, measured in states.items():
        for own, theirs in zip(measured, expected, strict=True):
            assert (own["step"], own["grad_scaler"]) == (theirs["step"], theirs["grad_scaler"]), backend
            for place, tensor in own["tensors"].items():  # DeepSpeed's are on the first data rank
                np.testing.assert_array_equal(tensor, theirs["tensors"][place], err_msg=f"{backend} {place}")
        assert measured[0]["tensors"].keys() == expected[0]["tensors"].keys()


@pytest.fixture(scope="module")
def overflowing(folder: Path, ranks: RankPool) -> list[dict[str, float]]:
    return _overflow(folder, ranks, "megatron", {})


def _overflow(folder: Path, ranks: RankPool, backend: str, optimizer: dict[str, Any]) -> list[dict[str, float]]:
    settings = {**optimizer, "initial_loss_scale": 2.0**28}
    config = _config(folder, f"scale-{backend}-{len(optimizer)}", backend, "fp16", optimizer=settings, parallel={})
    figures = ranks.run(2, train, config)[0]["figures"]
    return [figures[iteration] for iteration in range(1, 7)]


@pytest.mark.parametrize(
    ("backend", "optimizer"),
    [
        ("deepspeed", {}),
        pytest.param("torch", {}, marks=pytest.mark.slow),
        pytest.param("deepspeed", OFFLOAD, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_overflows_of_fp16_lower_the_scale_alike(
    folder: Path, ranks: RankPool, overflowing: list[dict[str, float]], backend: str, optimizer: dict[str, Any]
) -> None:
    measured = _overflow(folder, ranks, backend, optimizer)
    assert overflowing[0]["train/skipped"] == 1
    for ours, theirs in zip(measured, overflowing, strict=True):
        for name in ("train/loss_scale", "train/skipped"):
            assert ours[name] == theirs[name], name
        assert ours.get("train/grad_norm", 0.0) == pytest.approx(theirs.get("train/grad_norm", 0.0), rel=1e-2)
