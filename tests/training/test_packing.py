"""Documents that share a sequence don't see each other: losses and every gradient are those of each alone, under any
split and schedule, with masks of unequal length, and one whole micro-batch without a token that counts."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.one_step import BATCH_SIZE, one_step
from helpers.packed import PackedSamples, assert_equals_documents_alone, documents_of
from helpers.ranks import RankPool
from helpers.shards import pieces_of, whole
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee.config import Config
from megatron_ee.data.loader import BatchLoader
from megatron_ee.device import choose_device
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.training.assemble import build_stage

_EQUAL = [{"layers": 4}, {"layers": 4}]
_SEQUENCE = {"tensor": 2, "sequence": True}
_SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn"]}

CASES: dict[str, dict[str, Any]] = {
    "one process": {},
    "two sequences a micro-batch": {"training": {"micro_batch_size": 2}},
    "recomputed cores": {"training": _SELECTIVE},
    "recomputed layers": {"training": {"recompute": "full", "micro_batch_size": 2}},
    "plain loss": {"exits": {"loss_chunk_rows": 0}},
    "two data ranks": {"parallel": {"data": 2}},
    "sequence parallel": {"parallel": _SEQUENCE},
    "pipeline": {"parallel": {"pipeline": 2}, "training": {"micro_batch_size": 2}},
    "pipeline, recomputed cores": {"parallel": {"pipeline": 2}, "training": _SELECTIVE},
    "zero bubble, recomputed cores": {"parallel": {"pipeline": 2, "schedule": "zero-bubble"}, "training": _SELECTIVE},
    "zero bubble": {"parallel": {"pipeline": 2, "schedule": "zero-bubble"}},
    "megatron": {"parallel": {"pipeline": 2, "schedule": "megatron"}},
    "megatron, recomputed cores": {"parallel": {"pipeline": 2, "schedule": "megatron"}, "training": _SELECTIVE},
    "interleaved": {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}},
    "two pipelines of sequence parallel ranks": {"parallel": {**_SEQUENCE, "pipeline": 2}},
}
# What other cases, and those of test_todays_models.py, hold in all its parts: with the long sweeps.
IN_PARTS = {
    "one process",
    "two sequences a micro-batch",
    "recomputed layers",
    "plain loss",
    "sequence parallel",
    "pipeline",
    "pipeline, recomputed cores",
    "zero bubble, recomputed cores",
    "zero bubble",
    "megatron, recomputed cores",
    "interleaved",
    "two pipelines of sequence parallel ranks",
}


def _config(parallel: dict[str, Any] | None = None, **changes: Any) -> Config:
    parallel = {"data": 1, **(parallel or {})}
    parts = parallel.get("pipeline", 1) * parallel.get("chunks", 1)
    layout = {"layout": [{"layers": 8 // parts} for _ in range(parts)]}
    exits = {"layers": [2, 4, 7], "head": ["norm", "mlp", "block"], "loss_chunk_rows": 5, **changes.pop("exits", {})}
    return tiny_config(exits=exits, parallel={**layout, **parallel}, optimizer={"epsilon": 1e-3}, **changes)


def _world_size(config: Config) -> int:
    parallel = config.parallel
    assert parallel.data != "auto"
    return parallel.tensor * parallel.pipeline * parallel.data


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in IN_PARTS else []) for name in CASES]
)
def test_a_packed_batch_is_its_documents(name: str, ranks: RankPool) -> None:
    config = _config(**CASES[name])
    results = ranks.run(_world_size(config), one_step, config, None, 1, None, PackedSamples())
    assert_equals_documents_alone(config, results, BATCH_SIZE)


def _logits(config: Config) -> dict[str, Any]:
    """On each rank of one stage: its share of every exit's logits, over two sequences."""
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    layout = layout_of(config, VOCAB_SIZE)
    stage = build_stage(config, layout, VOCAB_SIZE, mesh)
    batch = BatchLoader(PackedSamples(), mesh, global_batch_size=4, micro_batch_size=2).batch(0)
    logits = []
    for microbatch in range(2):
        positions, documents_BS = batch.places_of(microbatch)
        with torch.no_grad():
            x_SBH = stage.embed(batch.tokens_MBS[microbatch])
            _, taps = stage.run_layers(x_SBH, positions, 0, 8, documents_BS=documents_BS)
            features = {
                tap.layer: stage.exit_features(x_SBH, tap.layer, positions, documents_BS=documents_BS)
                for tap, x_SBH in taps.items()
            }
            logits.append({layer: stage.project(x_SBH, layer).numpy() for layer, x_SBH in features.items()})
    return {"logits": logits, "parameters": pieces_of(stage, lambda parameter: parameter)}


@pytest.mark.parametrize(
    "parallel",
    [pytest.param({}, marks=pytest.mark.slow, id="one process"), pytest.param(_SEQUENCE, id="sequence parallel")],
)
def test_the_logits_of_a_document_are_those_of_it_alone(parallel: dict[str, Any], ranks: RankPool) -> None:
    config = _config(parallel)
    results = ranks.run(_world_size(config), _logits, config)
    parameters = {name: torch.tensor(value) for name, value in whole(r["parameters"] for r in results).items()}
    for sample in range(4):
        start = 0
        for tokens, _, _ in documents_of(sample):
            alone = reference.exit_logits(parameters, config.model, config.exits, tokens[None])
            for layer in (2, 4, 7, 8):
                shares = [r["logits"][sample // 2][layer][start : start + len(tokens), sample % 2] for r in results]
                np.testing.assert_allclose(np.concatenate(shares, axis=-1), alone[layer][0], atol=1e-5, rtol=0)
            start += len(tokens)
