"""The estimate against what a real rank holds."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.shards import pieces_of, whole
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.costs import chunk_costs, costs_of, weight_share
from megatron_ee.parallel.estimate import (
    describe,
    estimate,
    gate_parameters,
    head_parameters,
    layer_activations,
    weight_products,
)
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.world import MeshError
from megatron_ee.training.assemble import build_stage
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.megatron import MegatronAdamW
from megatron_ee.training.planning import plan_step

Measured = Callable[[str], list[dict[str, Any]]]

CONFIGS = {
    "one stage": tiny_config(),
    "two stages, own projections": tiny_config(
        parallel={"pipeline": 2}, exits={"layers": [2, 4, 7], "projection": "own"}, model={"hidden_size": 64}
    ),
    "unequal stages, full attention": tiny_config(
        parallel={"pipeline": 2, "layout": [{"layers": 3}, {"layers": 5}]},
        model={"num_key_value_heads": 4, "ffn_hidden_size": 96, "hidden_size": 48, "head_dim": 16},
        training={"micro_batch_size": 2},
    ),
    "tensor parallel": tiny_config(parallel={"tensor": 2}),
    "sequence parallel, two stages of two chunks, bf16": tiny_config(
        parallel={"tensor": 2, "sequence": True, "pipeline": 2, "chunks": 2, "schedule": "interleaved"},
        training={"precision": "bf16"},
        exits={"layers": [1, 5]},
    ),
    "heads of every kind, tied": tiny_config(
        parallel={"pipeline": 2},
        exits={"layers": [1, 2, 5], "head": ["mlp", "block", "norm"], "projection": ["shared", "own", "shared"]},
        model={"tie_embeddings": True},
    ),
    "gates of both kinds, split positions": tiny_config(
        parallel={"tensor": 2, "sequence": True, "pipeline": 2},
        exits={"layers": [1, 2, 5], "gate": ["linear", "none", "mlp"]},
    ),
    "gates, three wide": tiny_config(
        model={"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1},
        exits={"layers": [2, 5], "gate": "mlp", "head": "mlp"},
    ),
    "biases, normalised heads, windows": tiny_config(
        parallel={"tensor": 2},
        model={"qkv_bias": True, "qk_norm": True, "sliding_window": 4, "sliding_window_layers": [1, 8]},
        exits={"layers": [2, 5], "head": ["norm", "block"]},
    ),
    "one norm for all exits": tiny_config(parallel={"pipeline": 4}, exits={"layers": "all", "norm": "shared"}),
}


def _world_size(config: Config) -> int:
    return config.parallel.tensor * config.parallel.pipeline


@pytest.fixture(scope="module")
def measured_of(ranks: RankPool) -> Measured:
    """What each rank of a config holds; of each config once."""
    return cache(lambda name: ranks.run(_world_size(CONFIGS[name]), _measure, CONFIGS[name]))


_SLOW = ("biases, normalised heads, windows", "one norm for all exits")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in CONFIGS]
)
def test_memory_is_within_ten_percent_of_what_is_measured(name: str, measured_of: Measured) -> None:
    config = CONFIGS[name]
    measured = measured_of(name)
    estimated = estimate(config, _world_size(config), VOCAB_SIZE)
    for stage, actual in zip(estimated.stages, measured[:: config.parallel.tensor], strict=True):
        assert stage.parameters == actual["parameters"], "exact"
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(stage, part) == pytest.approx(actual[part], rel=0.1), part
    assert estimated.parameters == sum(value.size for value in whole(actual["values"] for actual in measured).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_of_a_layer(name: str, measured_of: Measured) -> None:
    """What autograd keeps of one micro-batch's layers, within a quarter."""
    config = CONFIGS[name]
    measured = measured_of(name)
    estimated = estimate(config, _world_size(config), VOCAB_SIZE)
    tokens = config.training.micro_batch_size * config.data.sequence_length
    plan = build_plan(
        config.parallel.schedule,
        num_stages=config.parallel.pipeline,
        num_chunks=config.parallel.chunks,
        num_microbatches=estimated.num_microbatches,
        has_exits=[True] * config.parallel.pipeline * config.parallel.chunks,
    )
    live = simulate(plan, lambda action: 1.0).peak_activations
    half = config.training.precision != "fp32"
    for stage, actual, at_once in zip(estimated.stages, measured[:: config.parallel.tensor], live, strict=True):
        logits = (3 * 4 + 2 * half) * VOCAB_SIZE * tokens // config.parallel.tensor
        assert (stage.activations - logits) / at_once == pytest.approx(actual["activations"], rel=0.25)


def test_a_table_shows_the_placement() -> None:
    config = tiny_config(parallel={"pipeline": 2}, exits={"layers": [2, 5]})
    lines = describe(estimate(config, 4, VOCAB_SIZE)).splitlines()
    assert lines[2].startswith("data-parallel ranks: 2, micro-batches a step: 4, bubble: ")
    assert lines[4].startswith("stage 0: layers 1-4, exits 2, ")
    assert lines[5].startswith("stage 1: layers 5-8, exits 5 final, 100.0% of the slowest stage's work, ")
    assert [line.split()[0] for line in lines[7:]] == ["stage", "0", "1"]


@pytest.mark.parametrize(
    "parallel",
    [
        {"schedule": "1f1b"},
        {"schedule": "gpipe"},
        {"schedule": "interleaved", "chunks": 2},
        {"schedule": "zero-bubble"},
        {"schedule": "1f1b", "layout": [{"layers": 6}, {"layers": 2}]},
    ],
    ids=["1f1b", "gpipe", "interleaved", "zero bubble", "unequal stages"],
)
def test_the_bubble_is_that_of_the_planned_step(parallel: dict[str, Any]) -> None:
    config = tiny_config(parallel={"pipeline": 2, **parallel})
    layout = layout_of(config, VOCAB_SIZE)
    weights = weight_share(config) if parallel["schedule"] == "zero-bubble" else None
    cost = chunk_costs(layout, config.exits, costs_of(config, VOCAB_SIZE), weights=weights)
    timeline = simulate(plan_step(config, layout, VOCAB_SIZE, 4), cost)
    assert estimate(config, 4, VOCAB_SIZE).bubble_fraction == pytest.approx(timeline.bubble_fraction)
    assert 0 < timeline.bubble_fraction < 1
    assert estimate(tiny_config(), 1, VOCAB_SIZE).bubble_fraction == 0


def test_thousands_of_microbatches_are_estimated_in_seconds() -> None:
    training = {"train_iters": 8, "global_batch_size": 2048, "micro_batch_size": 1}
    started = time.process_time()
    estimated = estimate(tiny_config(parallel={"pipeline": 8}, training=training), 8, VOCAB_SIZE)
    assert time.process_time() - started < 10
    assert estimated.bubble_fraction < 0.5


MLP = 3 * 32 * 48
LAYER = 32 * (32 + 2 * 16 + 32) + MLP + 2 * 32
MATRIX = VOCAB_SIZE * 32


@pytest.mark.parametrize(
    ("head", "projection", "tied", "first", "second", "whole_model"),
    [  # first: exits 2 and 4 and the embedding; second: exit 6 and the final one
        ("mlp", "shared", False, 2 * (MLP + 64) + 2 * MATRIX, MLP + 64 + 32 + MATRIX, 3 * (MLP + 64) + 32 + 2 * MATRIX),
        ("block", "own", False, 2 * (LAYER + 32) + 3 * MATRIX, LAYER + 64 + 2 * MATRIX, 3 * LAYER + 128 + 5 * MATRIX),
        ("norm", "shared", True, 64 + MATRIX, 64 + MATRIX, 128 + MATRIX),
        (
            ["norm", "mlp", "block"],
            ["own", "shared", "own"],
            True,
            32 + MLP + 64 + 2 * MATRIX,
            LAYER + 64 + 2 * MATRIX,
            32 + MLP + 64 + LAYER + 64 + 3 * MATRIX,
        ),
    ],
    ids=["mlp", "block, own projections", "tied", "all kinds, tied"],
)
def test_hand_count_of_heads_and_projections(
    head: Any, projection: Any, tied: bool, first: int, second: int, whole_model: int
) -> None:
    config = tiny_config(
        model={"tie_embeddings": tied},
        exits={"layers": [2, 4, 6], "head": head, "projection": projection},
        parallel={"pipeline": 2, "layout": [{"layers": 4}, {"layers": 4}]},
    )
    estimated = estimate(config, 2, VOCAB_SIZE)
    assert [stage.parameters for stage in estimated.stages] == [4 * LAYER + first, 4 * LAYER + second]
    assert estimated.parameters == 8 * LAYER + whole_model


def test_hand_count_of_gates() -> None:
    """A norm, a row and a bias; with an MLP a quarter as wide, its matrix and its biases."""
    model = tiny_config().model
    assert gate_parameters(model, "none") == 0
    assert gate_parameters(model, "linear") == 32 + 32 + 1
    assert gate_parameters(model, "mlp") == 32 + (32 * 8 + 8) + (8 + 1)
    bare, gated = (estimate(tiny_config(exits={"gate": gate}), 1, VOCAB_SIZE) for gate in ("none", ["linear", "mlp"]))
    assert gated.parameters - bare.parameters == (32 + 32 + 1) + (32 + 32 * 8 + 8 + 8 + 1)


def test_distillation_has_more_logits_at_a_time() -> None:
    bare, distilled = (
        estimate(tiny_config(exits={"distillation": distillation}), 1, VOCAB_SIZE).stages[0].activations
        for distillation in (None, {})
    )
    assert distilled - bare == 3 * 4 * VOCAB_SIZE * SEQUENCE_LENGTH


def test_heads_are_split_over_tensor_parallel_ranks() -> None:
    model = tiny_config().model
    assert head_parameters(model, "mlp", 2) == MLP // 2 + 64
    assert head_parameters(model, "block", 2) == (LAYER - 64) // 2 + 64 + 32


def _activations(schedule: str = "1f1b", **changes: dict[str, Any]) -> int:
    parallel = {"pipeline": 2, "schedule": schedule, "layout": [{"layers": 4}, {"layers": 4}]}
    return estimate(tiny_config(parallel=parallel, **changes), 2, VOCAB_SIZE).stages[0].activations


def test_what_saves_memory_is_counted() -> None:
    tokens, live = SEQUENCE_LENGTH, 2
    numbers = layer_activations(tiny_config().parallel, tiny_config().model)
    plain = _activations()
    full = _activations(training={"recompute": "full"})
    assert plain - full == 4 * tokens * (live * 4 * (numbers - 32) - (numbers - 32 - 3 * 32)), "and one layer again"
    modules = _activations(training={"recompute": "selective", "recompute_modules": ["mlp", "layernorm"]})
    saved = 3 * 48 + 4 * 32
    assert plain - modules == 4 * tokens * (live * 4 * saved - (saved - 3 * 32))
    assert _activations(training={"recompute": "selective"}) == plain, "attention keeps no scores as it is"
    exits = {"layers": [2, 3]}
    released = _activations(exits={**exits, "release": True})
    assert _activations(exits=exits) - released == 4 * tokens * live * 2 * 32, "gradients of two exits, for each"
    chunked = _activations(exits={"layers": [2, 5], "loss_chunk_rows": 4})
    assert plain - chunked == 3 * 4 * VOCAB_SIZE * (tokens - 4)
    heads = [_activations(exits={"layers": [2, 5], "head": head}) for head in ("norm", "mlp", "block")]
    assert heads[0] == plain
    assert [size - plain for size in heads] == [0, 4 * tokens * (3 * 32 + 3 * 48), 4 * tokens * numbers]


def test_schedules_hold_as_much_as_those_that_they_are_like() -> None:
    plain = _activations()
    assert _activations("filled-1f1b") == plain
    assert _activations("megatron") == _activations(exits={"layers": [2, 5], "release": True})
    rounds = {"pipeline": 2, "chunks": 2, "layout": [{"layers": 2}] * 4}
    ours, megatron = (
        estimate(tiny_config(parallel={**rounds, "schedule": schedule}, exits=exits), 2, VOCAB_SIZE).stages
        for schedule, exits in (("interleaved", {"layers": [2, 5], "release": True}), ("megatron", {"layers": [2, 5]}))
    )
    assert ours == megatron


def test_what_waits_for_weights_is_counted() -> None:
    """Stage 0 holds no more than with 1F1B; stage 1 runs W of a micro-batch after B of the next."""
    assert _activations("zero-bubble") == _activations()
    parallel = {"pipeline": 2, "layout": [{"layers": 4}, {"layers": 4}]}
    for recompute in ("none", "full"):
        plain, apart = (
            estimate(
                tiny_config(parallel={**parallel, "schedule": schedule}, training={"recompute": recompute}),
                2,
                VOCAB_SIZE,
            )
            .stages[1]
            .activations
            for schedule in ("1f1b", "zero-bubble")
        )
        of_one = 4 * SEQUENCE_LENGTH * 4 * weight_products(tiny_config().parallel, tiny_config().model)
        of_layers = 4 * SEQUENCE_LENGTH * 4 * layer_activations(tiny_config().parallel, tiny_config().model)
        assert of_one < of_layers
        assert apart - plain >= of_one, "where a layer is computed again, two of them outweigh what F keeps"
        assert recompute == "full" or apart - plain == of_one


def test_a_distributed_optimizer_is_shared_by_data_parallel_ranks() -> None:
    for precision, numbers in (("fp32", 2), ("bf16", 3)):
        training = {"precision": precision}
        (alone,) = estimate(tiny_config(training=training), 4, VOCAB_SIZE).stages
        parallel = {"distributed_optimizer": True}
        (shared,) = estimate(tiny_config(training=training, parallel=parallel), 4, VOCAB_SIZE).stages
        assert alone.optimizer == 4 * numbers * alone.parameters
        assert shared.optimizer == numbers * alone.parameters
        assert (shared.weights, shared.gradients) == (alone.weights, alone.gradients)


def test_zero_keeps_a_share_with_master_weights_and_offloads_it() -> None:
    for precision, size in (("fp32", 4), ("bf16", 2)):
        training = {"precision": precision}
        (plain,) = estimate(tiny_config(training=training, optimizer={"backend": "torch"}), 4, VOCAB_SIZE).stages
        (zero,) = estimate(tiny_config(training=training, optimizer={"backend": "deepspeed"}), 4, VOCAB_SIZE).stages
        offload = {"backend": "deepspeed", "deepspeed": {"offload": "cpu"}}
        estimated = estimate(tiny_config(training=training, optimizer=offload), 4, VOCAB_SIZE)
        (offloaded,) = estimated.stages
        assert (zero.optimizer, zero.host) == (4 * 3 * plain.parameters // 4, 0)
        assert (offloaded.optimizer, offloaded.host) == (0, (4 * 4 + size) * plain.parameters // 4)
        assert offloaded.total == plain.weights + plain.gradients + plain.activations
        assert describe(estimated).splitlines()[-2].endswith("each rank       host")


def test_processes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MeshError, match="3 processes don't divide into 2 stages"):
        estimate(tiny_config(parallel={"pipeline": 2}), 3, VOCAB_SIZE)


def _measure(config: Config) -> dict[str, Any]:
    device = choose_device("cpu")
    mesh = open_mesh(config.parallel, device)
    layout = layout_of(config, VOCAB_SIZE)
    stage = build_stage(config, layout, VOCAB_SIZE, mesh)
    gradients = StageGradients(stage, mesh, config.parallel)
    optimizer = MegatronAdamW(stage, config.optimizer, mesh, gradients)
    gradients.zero()
    optimizer.step(1e-3)
    state = optimizer.sharded_state_dict(stage.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp}))
    return {
        "parameters": sum(parameter.numel() for parameter in stage.parameters()),
        "values": pieces_of(stage, lambda parameter: parameter),
        "weights": sum(parameter.nbytes for parameter in stage.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in gradients.ddp.buffers),
        "optimizer": _bytes({name: part for name, part in state.items() if name != "param_groups"}),
        "activations": _kept_bytes(stage, config),
    }


def _bytes(state: Any) -> int:
    """Of all tensors in a checkpoint's state, as this rank holds them."""
    apply_factories(state)
    return sum(entry.data.nbytes for entry in nested_values(state) if getattr(entry, "data", None) is not None)


def _kept_bytes(stage: Stage, config: Config) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, length = config.training.micro_batch_size, config.data.sequence_length
    shape = (length // (config.parallel.tensor if config.parallel.sequence else 1), batch, config.model.hidden_size)
    x = torch.randn(shape, dtype=DTYPES[config.training.precision], requires_grad=True)
    alive = []
    chunk = stage.chunks[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), keep(t))[1], lambda t: t):
        y, _ = stage.run_layers(x, torch.arange(length), chunk.start, chunk.stop)
    kept[y.untyped_storage().data_ptr()] = y.nbytes
    return sum(kept.values())


def test_masks_of_windows_are_counted() -> None:
    """All sequences share them, unless documents are packed, and so do all layers that see alike."""
    tokens, live = SEQUENCE_LENGTH, 2
    plain = _activations(training={"micro_batch_size": 2})
    for window, layers, kinds in ((4, "all", 1), (4, [1, 3], 1), (4, [5, 8], 0), (12, "all", 0)):
        model = {"sliding_window": window, "sliding_window_layers": layers}
        windowed = _activations(training={"micro_batch_size": 2}, model=model)
        assert windowed - plain == live * kinds * tokens * tokens * 4, (window, layers)
    data = {"format": "messages", "dataset": "a.jsonl", "sequence_length": 256}
    one, two = (
        _activations(data=data, model={"sliding_window": 4, "sliding_window_layers": layers})
        for layers in ("all", [1, 3])
    )
    assert two - one == live * 256 * 256 * 4


def test_a_mask_between_documents_is_counted() -> None:
    """One for each live micro-batch, of as many numbers as pairs of positions; none where nothing is packed."""
    data = {"format": "messages", "dataset": "a.jsonl", "sequence_length": 256}
    packed, single = (_activations(data={**data, "packing": packing}) for packing in (True, False))
    assert packed - single == 2 * 256 * 256 * 4
