"""The estimate against what a real rank holds."""

from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.model.initialize import initialize
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.estimate import describe, estimate
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.world import MeshError
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
}


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_within_ten_percent_of_what_is_measured(name: str, ranks: RankPool) -> None:
    config = CONFIGS[name]
    measured = ranks.run(config.parallel.pipeline, _measure, config)
    estimated = estimate(config, config.parallel.pipeline, VOCAB_SIZE)
    for stage, actual in zip(estimated.stages, measured, strict=True):
        assert stage.parameters == actual["parameters"], "exact"
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(stage, part) == pytest.approx(actual[part], rel=0.1), part
    distinct = {key: size for actual in measured for key, size in actual["names"].items()}
    assert estimated.parameters == sum(distinct.values()), "copies count once"


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_of_a_layer(name: str, ranks: RankPool) -> None:
    """What autograd keeps of one micro-batch's layers, within a quarter."""
    config = CONFIGS[name]
    measured = ranks.run(config.parallel.pipeline, _measure, config)
    estimated = estimate(config, config.parallel.pipeline, VOCAB_SIZE)
    tokens = config.training.micro_batch_size * config.data.sequence_length
    for stage, actual in zip(estimated.stages, measured, strict=True):
        num_live = min(config.parallel.pipeline - estimated.stages.index(stage), estimated.num_microbatches)
        layers = (stage.activations - 3 * VOCAB_SIZE * tokens * 4) / num_live
        assert layers == pytest.approx(actual["activations"], rel=0.25)


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
    layouts = place(config.model, config.exits, config.parallel)
    layout = layouts[mesh.pipeline_rank]
    stage = Stage(config.model, config.exits, layout, vocab_size=VOCAB_SIZE, groups=mesh.groups, device=device)
    initialize(stage, 0)
    gradients = StageGradients(stage, mesh, layouts)
    optimizer = MegatronAdamW(stage, config.optimizer, mesh, gradients)
    gradients.zero()
    optimizer.step(1e-3)
    moments = optimizer.sharded_state_dict(stage.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp}))
    names = {
        name.replace(f"exits.{config.model.num_layers}.", ""): parameter.numel()
        for name, parameter in stage.named_parameters()
    }
    return {
        "parameters": sum(parameter.numel() for parameter in stage.parameters()),
        "names": names,
        "weights": sum(parameter.nbytes for parameter in stage.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in gradients.ddp.buffers),
        "optimizer": sum(_bytes(state) for state in moments["state"].values() if isinstance(state, dict)),
        "activations": _kept_bytes(stage, config),
    }


def _bytes(state: dict[str, Any]) -> int:
    return sum(entry.data.nbytes for entry in state.values() if hasattr(entry, "data") and entry.data is not None)


def _kept_bytes(stage: Stage, config: Config) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, length = config.training.micro_batch_size, config.data.sequence_length
    x = torch.randn(length, batch, config.model.hidden_size, requires_grad=True)
    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), keep(t))[1], lambda t: t):
        y, _ = stage.run_layers(x, torch.arange(length), stage.layout.start, stage.layout.stop)
    kept[y.untyped_storage().data_ptr()] = y.nbytes
    return sum(kept.values())
