"""The estimate against what a real rank holds."""

from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.shards import pieces_of, whole
from helpers.tiny import VOCAB_SIZE, tiny_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.estimate import describe, estimate
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.world import MeshError
from megatron_ee.training.build import build_stage
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.megatron import MegatronAdamW

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
}


def _world_size(config: Config) -> int:
    return config.parallel.tensor * config.parallel.pipeline


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_within_ten_percent_of_what_is_measured(name: str, ranks: RankPool) -> None:
    config = CONFIGS[name]
    measured = ranks.run(_world_size(config), _measure, config)
    estimated = estimate(config, _world_size(config), VOCAB_SIZE)
    for stage, actual in zip(estimated.stages, measured[:: config.parallel.tensor], strict=True):
        assert stage.parameters == actual["parameters"], "exact"
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(stage, part) == pytest.approx(actual[part], rel=0.1), part
    assert estimated.parameters == sum(value.size for value in whole(actual["values"] for actual in measured).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_of_a_layer(name: str, ranks: RankPool) -> None:
    """What autograd keeps of one micro-batch's layers, within a quarter."""
    config = CONFIGS[name]
    measured = ranks.run(_world_size(config), _measure, config)
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
    lines = describe(estimate(config, 4, VOCAB_SIZE), 8).splitlines()
    assert lines[2] == "data-parallel ranks: 2, micro-batches a step: 4"
    assert lines[5].split()[:3] == ["0", "1-4", "2"]
    assert lines[6].split()[:4] == ["1", "5-8", "5", "final"]


def test_processes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MeshError, match="3 processes don't divide into 2 stages"):
        estimate(tiny_config(parallel={"pipeline": 2}), 3, VOCAB_SIZE)


def _measure(config: Config) -> dict[str, Any]:
    device = choose_device("cpu")
    mesh = open_mesh(config.parallel, device)
    layout = place(config.model, config.exits, config.parallel)
    stage = build_stage(config, layout, VOCAB_SIZE, mesh)
    gradients = StageGradients(stage, mesh, layout)
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
