"""Exits trained alone: losses and gradients are those of a plain model whose trunk is detached, however it is split."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.one_step import BATCH_SIZE, Arrays, one_step, samples_of
from helpers.ranks import RankPool
from helpers.shards import whole
from helpers.tiny import tiny_config

from megatron_ee.config import Config

HEADS = {"layers": [2, 4, 6], "head": ["norm", "mlp", "block"], "projection": ["shared", "own", "shared"]}
OWN = {**HEADS, "projection": ["own", "shared", "own"]}
TUNING = {"train_iters": 8, "global_batch_size": 8, "micro_batch_size": 1, "trains": "exits"}
CHECKPOINT = {"initial": "not read by this test"}
OVERLAPPED = {"overlap_grad_reduce": True, "distributed_optimizer": True}


def _pinned(*layers: int, **last: Any) -> list[dict[str, Any]]:
    return [*({"layers": count} for count in layers[:-1]), {"layers": layers[-1], **last}]


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "two stages": (2, {"pipeline": 2}),
    "two stages, gpipe": (2, {"pipeline": 2, "schedule": "gpipe"}),
    "a stage without exits": (2, {"pipeline": 2, "layout": _pinned(1, 5)}),
    "an idle stage": (2, {"pipeline": 2, "layout": _pinned(6, 0)}),
    "four stages, one without exits, one idle": (4, {"pipeline": 4, "layout": _pinned(1, 2, 3, 0)}),
    "an exit on its stage's input": (
        2,
        {"pipeline": 2, "layout": [{"layers": 2, "exits_at_end": False}, {"layers": 4, "exits_at_start": True}]},
    ),
    "two replicas": (2, {"data": 2}),
    "two replicas that share, of a stage with exits and an idle one": (
        4,
        {"pipeline": 2, "data": 2, "layout": _pinned(6, 0), **OVERLAPPED},
    ),
    "two replicas that share, of two stages": (4, {"pipeline": 2, "data": 2, **OVERLAPPED}),
    "tensor": (2, {"tensor": 2}),
    "tensor and sequence, two stages": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
}


@cache
def _parameters(ranks: RankPool, exits: str, tie: bool) -> Arrays:
    """The whole model's, which depend on the seed and their names alone."""
    config = tiny_config(exits=_weighted({"HEADS": HEADS, "OWN": OWN}[exits]), model={"tie_embeddings": tie})
    (result,) = ranks.run(1, one_step, config)
    return whole([result["parameters"]])


def _weighted(exits: dict[str, Any]) -> dict[str, Any]:
    return {**exits, "weights": [0.3, 0.9, 0.6], "weight_schedule": {"shape": "constant"}}


def _reference(config: Config, parameters: Arrays) -> tuple[dict[int, float], Arrays]:
    """Each exit's loss, and the gradients of all that belongs to exits."""
    leaves = {name: torch.tensor(value, requires_grad=name.startswith("exits.")) for name, value in parameters.items()}
    samples = samples_of(config, 0, BATCH_SIZE, 0)
    logits = reference.exit_logits(leaves, config.model, config.exits, samples.tokens_BS)
    weights = dict(zip(config.exits.layers, config.exits.weights, strict=True))
    losses = {
        layer: reference.weighted_loss(logits, samples.labels_BS, samples.mask_BS, {layer: 1.0}) for layer in weights
    }
    torch.stack([weights[layer] * loss for layer, loss in losses.items()]).sum().backward()
    gradients = {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}
    return {layer: loss.item() for layer, loss in losses.items()}, gradients


def _check(
    ranks: RankPool, world_size: int, exits: str, *, tie: bool = False, rows: int = 512, **parallel: Any
) -> None:
    config = tiny_config(
        exits={**_weighted({"HEADS": HEADS, "OWN": OWN}[exits]), "loss_chunk_rows": rows},
        model={"tie_embeddings": tie},
        parallel={"data": 1, **parallel},
        training=TUNING,
        checkpoint=CHECKPOINT,
    )
    results = ranks.run(world_size, one_step, config, None, 2 if "overlap_grad_reduce" in parallel else 1)
    parameters = _parameters(ranks, exits, tie)
    built = whole(result["parameters"] for result in results)
    assert all(np.array_equal(value, parameters[name]) for name, value in built.items())
    assert not {"layers.7.mlp.linear_fc1.weight", "norm.weight"} & built.keys(), "nothing beyond the last exit is built"
    losses, gradients = _reference(config, parameters)
    measured = whole(result["gradients"] for result in results)
    assert measured.keys() == gradients.keys() == {name for name in parameters if name.startswith("exits.")}
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(measured[name], gradient, atol=1e-5, rtol=0, err_msg=name)
    norm = float(np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values())))
    for result in results:
        assert "train/exit_8/loss" not in result["figures"]
        for layer, loss in losses.items():
            assert result["figures"][f"train/exit_{layer}/loss"] == pytest.approx(loss, abs=1e-5)
        assert result["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    stepped = whole(result["stepped"] for result in results)
    changed = {name for name, value in stepped.items() if not np.array_equal(value, parameters[name])}
    assert changed == gradients.keys(), "all exits change, and nothing else does"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_plain_model_with_a_detached_trunk(ranks: RankPool, name: str) -> None:
    world_size, parallel = CASES[name]
    _check(ranks, world_size, "HEADS", **parallel)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_own_and_shared_projections_of_tied_and_untied_models(ranks: RankPool, tie: bool) -> None:
    _check(ranks, 2, "OWN", tie=tie, pipeline=2, rows=5)
    _check(ranks, 2, "HEADS", tie=tie, tensor=2, rows=0)
