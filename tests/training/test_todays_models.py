"""What today's models need beside Llama's layer: biases of queries, keys and values, normalised heads, windows, scaled
positions. Losses, every gradient and one optimizer step equal those of the plain model, under splits and schedules."""

from typing import Any

import pytest
import torch
from helpers.one_step import BATCH_SIZE, assert_equals_reference, one_step
from helpers.packed import PackedSamples, assert_equals_documents_alone
from helpers.ranks import RankPool
from helpers.tiny import tiny_config

from megatron_ee.config import Config
from megatron_ee.model.stage import Stage

LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"kind": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SOME_LAYERS = {"sliding_window": 3, "sliding_window_layers": [1, 4, 7]}
QWEN3 = {"qk_norm": True, "rope_scaling": YARN, **SOME_LAYERS}
ALL = {"qkv_bias": True, **QWEN3}

_SEQUENCE = {"tensor": 2, "sequence": True}
_ZERO_BUBBLE = {"pipeline": 2, "schedule": "zero-bubble"}
_CHUNKS = {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}
_SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}

MODELS: dict[str, dict[str, Any]] = {
    "biases": {"qkv_bias": True},
    "normalised heads": {"qk_norm": True},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 3.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "windows": {"sliding_window": 3},
    "windows of one": {"sliding_window": 1, "sliding_window_layers": [8]},
    "some windows": SOME_LAYERS,
    "all at once": ALL,
}
SPLITS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"parallel": {"tensor": 2}},
    "sequence parallel": {"parallel": _SEQUENCE},
    "pipeline, recomputed layers": {
        "parallel": {"pipeline": 2},
        "training": {"recompute": "full", "micro_batch_size": 2},
    },
    "chunks, recomputed modules": {"parallel": _CHUNKS, "training": _SELECTIVE},
    "zero bubble": {"parallel": _ZERO_BUBBLE},
    "zero bubble, sequence parallel": {"parallel": {**_ZERO_BUBBLE, **_SEQUENCE}},
    "megatron, recomputed cores": {
        "parallel": {"pipeline": 2, "schedule": "megatron"},
        "training": {"recompute": "selective", "recompute_modules": ["core_attn"]},
    },
    "layer dropout": {"training": {"micro_batch_size": 2, "layer_dropout": {"maximum": 0.6}}},
    "overlap, distributed optimizer": {
        "parallel": {"tensor": 2, "data": 2, "overlap_grad_reduce": True, "distributed_optimizer": True},
    },
}
# The split below that has another beside it holds each, too: with the long sweeps.
IN_PARTS = {"tensor parallel", "sequence parallel"}
PACKED = ["pipeline, recomputed layers", "chunks, recomputed modules", "zero bubble, sequence parallel"]
ITERATION = 1


def _config(model: dict[str, Any], split: dict[str, Any]) -> Config:
    parallel = {"data": 1, **split.get("parallel", {})}
    parts = parallel.get("pipeline", 1) * parallel.get("chunks", 1)
    return tiny_config(
        model=model,
        exits={"layers": [2, 4, 7], "head": ["norm", "mlp", "block"], "loss_chunk_rows": 5},
        parallel={"layout": [{"layers": 8 // parts}] * parts, **parallel},
        training=split.get("training", {}),
        optimizer={"epsilon": 1e-3},
    )


def _step(config: Config, packed: bool) -> dict[str, Any]:
    """On each rank: a step whose biases and norms are no longer what they began as."""
    repeats = 2 if config.parallel.overlap_grad_reduce else 1
    source = PackedSamples() if packed else None
    return one_step(config, repeats=repeats, source=source, iteration=ITERATION, change=_change_vectors)


def _change_vectors(stage: Stage) -> None:
    """All ranks and splits alike: a bias of 0 or a norm of 1 would hide where it is applied."""
    for name, parameter in stage.named_parameters():
        if parameter.dim() == 1 and "self_attention" in name:
            whole = torch.linspace(0.5, 1.5, 64) if "norm" in name else torch.linspace(-0.4, 0.6, 64)
            rank, size = stage.tp_group.rank(), len(parameter)
            start = 0 if "norm" in name else rank * size
            with torch.no_grad():
                parameter.copy_(whole[start : start + size])


def _world_size(config: Config) -> int:
    parallel = config.parallel
    assert parallel.data != "auto"
    return parallel.tensor * parallel.pipeline * parallel.data


@pytest.mark.parametrize("name", MODELS)
def test_each_field(name: str, ranks: RankPool) -> None:
    _check(_config(MODELS[name], {}), ranks)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in IN_PARTS else []) for name in SPLITS]
)
def test_all_fields_under_splits(name: str, ranks: RankPool) -> None:
    _check(_config(ALL, SPLITS[name]), ranks)


@pytest.mark.parametrize("name", PACKED)
def test_windows_hold_within_documents(name: str, ranks: RankPool) -> None:
    config = _config(ALL, SPLITS[name])
    results = ranks.run(_world_size(config), _step, config, True)
    assert_equals_documents_alone(config, results, BATCH_SIZE)


def _check(config: Config, ranks: RankPool) -> None:
    assert_equals_reference(config, ranks.run(_world_size(config), _step, config, False), ITERATION)
