"""Losses and every gradient of a pipeline equal those of one autograd over an independent model in one process."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.ranks import RankPool
from helpers.shards import pieces_of, whole
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, RandomSamples, tiny_config

from megatron_ee.config import Config
from megatron_ee.data.loader import BatchLoader
from megatron_ee.device import choose_device
from megatron_ee.parallel.layout import have_exits, layout_of
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.runtime import Runtime
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.training.build import build_stage
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.loss_weights import loss_weights
from megatron_ee.training.losses import count_tokens
from megatron_ee.training.metrics import ExitMeter
from megatron_ee.training.optimizers.megatron import MegatronAdamW
from megatron_ee.training.stage_step import StageStep

Arrays = dict[str, np.ndarray]


def _two_stages(left_end: bool, right_start: bool) -> list[dict[str, Any]]:
    return [{"layers": 4, "exits_at_end": left_end}, {"layers": 4, "exits_at_start": right_start}]


_SEQUENCE = {"tensor": 2, "sequence": True}
_CHUNKS = {"chunks": 2, "schedule": "interleaved"}
_PINNED = [
    {"layers": 2, "exits_at_end": False},
    {"layers": 2, "exits_at_start": True},
    {"layers": 2},
    {"layers": 2},
]


@dataclass(frozen=True)
class Case:
    """Exits after `exits`, on `data` pipelines of as many stages as `parallel` says."""

    name: str
    exits: list[int]
    parallel: dict[str, Any]
    data: int = 1
    projection: str = "shared"
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1) * self.data

    def config(self) -> Config:
        exits = {"layers": self.exits, "projection": self.projection}
        return tiny_config(exits=exits, parallel=self.parallel, model=self.model)


CASES = [
    Case("one process", [2, 5], {}),
    Case("one process, own projections", [2, 5], {}, projection="own"),
    Case("exit in the middle of each stage", [2, 6], {"pipeline": 2}),
    Case("two exits on one stage", [1, 3], {"pipeline": 2}),
    Case("exit at the end of a stage", [4], {"pipeline": 2}),
    Case("exit at the start of a stage", [4], {"pipeline": 2, "layout": _two_stages(False, True)}),
    Case("exits only in the last stage", [5, 7], {"pipeline": 2}),
    Case("no early exits", [], {"pipeline": 2}),
    Case("unequal stages", [3, 6], {"pipeline": 2, "layout": [{"layers": 5}, {"layers": 3}]}),
    Case("own projections", [2, 4, 7], {"pipeline": 2}, projection="own"),
    Case("gpipe", [2, 4, 6], {"pipeline": 2, "schedule": "gpipe"}),
    Case("two pipelines", [2, 4, 6], {"pipeline": 2}, data=2),
    Case("data parallel alone", [3], {}, data=2),
    Case("four stages, one without exits", [2, 4, 7], {"pipeline": 4}),
    Case("four stages, own projections", [1, 2, 5], {"pipeline": 4}, projection="own"),
    Case("four stages, exit on every layer", [1, 2, 3, 4, 5, 6, 7], {"pipeline": 4}),
    Case("tensor parallel", [2, 5], {"tensor": 2}),
    Case("tensor parallel, own projections", [2, 5], {"tensor": 2}, projection="own"),
    Case("sequence parallel", [2, 5], {"tensor": 2, "sequence": True}),
    Case("tensor and pipeline", [2, 4, 7], {"tensor": 2, "pipeline": 2}),
    Case("sequence and pipeline, own projections", [2, 4], {**_SEQUENCE, "pipeline": 2}, projection="own"),
    Case("tensor and data", [3], {"tensor": 2}, data=2),
    Case("two chunks", [1, 4, 5], {"pipeline": 2, **_CHUNKS}),
    Case("two chunks, exit on every layer", [1, 2, 3, 4, 5, 6, 7], {"pipeline": 2, **_CHUNKS}),
    Case("two chunks, exits at both sides of borders", [2, 4, 6], {"pipeline": 2, **_CHUNKS, "layout": _PINNED}),
    Case("two chunks, own projections", [2, 4, 6], {"pipeline": 2, **_CHUNKS}, projection="own"),
    Case("two chunks, no early exits", [], {"pipeline": 2, **_CHUNKS}),
    Case("four chunks", [1, 5], {"pipeline": 2, "chunks": 4, "schedule": "interleaved"}),
    Case("four stages of two chunks", [2, 3, 6], {"pipeline": 4, **_CHUNKS}),
    Case("two chunks, tensor parallel", [2, 4, 5], {**_SEQUENCE, "pipeline": 2, **_CHUNKS}),
    Case("two chunks, two pipelines", [2, 4, 5], {"pipeline": 2, **_CHUNKS}, data=2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_autograd_over_the_whole_model(case: Case, ranks: RankPool) -> None:
    results = ranks.run(case.world_size, _step, case.config())
    parameters = whole(result["parameters"] for result in results)
    losses, gradients = _reference_step(case.config(), parameters)
    for result in results:
        for layer, loss in losses.items():
            assert result["figures"][f"train/exit_{layer}/loss"] == pytest.approx(loss, abs=1e-5)
    measured = whole(result["gradients"] for result in results)
    assert measured.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(measured[name], gradient, atol=1e-5 * scale, rtol=0, err_msg=name)
    norm = float(np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values())))
    for result in results:
        assert result["gradient_norm"] == pytest.approx(norm, rel=1e-5), "a copy counts once"
        assert result["own_norm"] == pytest.approx(norm, rel=1e-5), "a copy counts once"


def _step(config: Config) -> dict[str, Any]:
    """On each rank: one step on the first global batch."""
    device = choose_device("cpu")
    mesh = open_mesh(config.parallel, device)
    layout = layout_of(config, VOCAB_SIZE)
    stage = build_stage(config, layout, VOCAB_SIZE, mesh)
    parameters = pieces_of(stage, lambda parameter: parameter)
    buffers = StageGradients(stage, mesh, layout)
    loader = BatchLoader(RandomSamples(), mesh, global_batch_size=8, micro_batch_size=1)
    batch = loader.batch(0)
    num_tokens = count_tokens(batch, mesh)
    weights = loss_weights(config.exits, config.model.num_layers, 0)
    step = StageStep(stage, batch, {layer: weight / num_tokens for layer, weight in weights.items()})
    plan = build_plan(
        config.parallel.schedule,
        num_stages=mesh.pipeline_size,
        num_chunks=config.parallel.chunks,
        num_microbatches=loader.num_microbatches,
        has_exits=have_exits(layout),
    )
    buffers.zero()
    positions = SEQUENCE_LENGTH // (config.parallel.tensor if config.parallel.sequence else 1)
    Runtime(mesh, MessageSpec((positions, 1, 32), torch.float32, device.torch)).run(plan, step)
    buffers.reduce()
    gradients = pieces_of(stage, lambda parameter: parameter.main_grad)
    own_norm = buffers.norm()
    meter = ExitMeter([*config.exits.layers, config.model.num_layers], mesh)
    meter.add(step.losses, num_tokens)
    figures = meter.read("train", weights)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "figures": figures,
        "own_norm": own_norm,
        "gradient_norm": MegatronAdamW(stage, config.optimizer, mesh, buffers).step(1e-3),
    }


def _reference_step(config: Config, parameters: Arrays) -> tuple[dict[int, float], Arrays]:
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}
    samples = [RandomSamples()[index] for index in range(8)]
    tokens_BS, labels_BS, mask_BS = (
        torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")
    )
    logits = reference.exit_logits(leaves, config.model, list(config.exits.layers), tokens_BS)
    weights = loss_weights(config.exits, config.model.num_layers, 0)
    losses = {layer: reference.weighted_loss(logits, labels_BS, mask_BS, {layer: 1.0}).item() for layer in weights}
    reference.weighted_loss(logits, labels_BS, mask_BS, weights).backward()
    return losses, {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}
