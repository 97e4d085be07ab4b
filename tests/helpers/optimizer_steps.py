"""Several steps of an optimizer backend on real ranks, and the same by torch's AdamW on the model of `reference.py`."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch

from helpers import reference
from helpers.one_step import BATCH_SIZE, Arrays, samples_of
from helpers.shards import Pieces, pieces_of
from helpers.tiny import VOCAB_SIZE, RandomSamples, tiny_config
from megatron_ee.config import Config
from megatron_ee.data.loader import BatchLoader
from megatron_ee.device import choose_device
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.training.assemble import build_runtime, build_stage, message_between_stages
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.loss_weights import weights_at
from megatron_ee.training.losses import count_tokens
from megatron_ee.training.optimizers import BACKENDS
from megatron_ee.training.planning import plan_step
from megatron_ee.training.stage_step import StageStep

NUM_STEPS = 3
RATES = [1e-2, 5e-3, 2e-3]


def steps_config(backend: str, parallel: Mapping[str, Any], **changes: Any) -> Config:
    """Exits on every stage, clipping that is active, decay of some."""
    settings = {"backend": backend, "weight_decay": 0.25, "no_weight_decay": ["embedding.*"], "epsilon": 1e-3}
    return tiny_config(
        exits={"layers": [2, 5], "weight_schedule": {"shape": "constant"}, **changes.pop("exits", {})},
        parallel={"data": 1, **parallel},
        optimizer={**settings, **changes.pop("optimizer", {})},
        **changes,
    )


def backend_steps(
    config: Config, *, poisoned: int | None = None, frozen_stage: int | None = None
) -> tuple[Pieces, Pieces, list[float | None]]:
    """On each rank: parameters before and after, and what each step returned.

    Args:
        poisoned: the step in which one number of a gradient of rank 0 is none.
        frozen_stage: a stage with nothing to train.
    """
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    layout = layout_of(config, VOCAB_SIZE)
    stage = build_stage(config, layout, VOCAB_SIZE, mesh)
    if mesh.pipeline_rank == frozen_stage:
        stage.requires_grad_(False)
    before = pieces_of(stage, lambda parameter: parameter)
    gradients = StageGradients(stage, mesh, config.parallel)
    optimizer = BACKENDS[config.optimizer.backend](stage, config.optimizer, mesh, gradients)
    size = config.training.micro_batch_size
    plan = plan_step(config, layout, VOCAB_SIZE, BATCH_SIZE // mesh.data_size // size)
    loader = BatchLoader(RandomSamples(), mesh, global_batch_size=BATCH_SIZE, micro_batch_size=size)
    runtime = build_runtime(config, mesh, message_between_stages(config, mesh.device), stage, gradients)
    norms = []
    for number in range(NUM_STEPS):
        batch = loader.batch(number * BATCH_SIZE)
        tokens = count_tokens(batch, plan, mesh)
        weights = weights_at(config, number)
        step = StageStep(stage, batch, plan, tokens, weights, exits=config.exits, no_sync=gradients.no_sync)
        gradients.zero()
        runtime.run(plan, step)
        if number == poisoned and mesh.rank == 0:
            next(parameter.main_grad for parameter in stage.parameters() if parameter.requires_grad)[0] = torch.nan
        gradients.reduce(tokens.gradient_factor)
        norms.append(optimizer.step(RATES[number]))
    return before, pieces_of(stage, lambda parameter: parameter), norms


def reference_steps(config: Config, parameters: Arrays, *, left_out: int | None = None) -> tuple[Arrays, list[float]]:
    """By one autograd over an independent model, and torch.optim.AdamW: parameters afterwards, and norms.

    Args:
        left_out: a step that doesn't take place.
    """
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}
    settings = config.optimizer

    def decays(name: str) -> bool:
        return leaves[name].dim() > 1 and not any(fnmatch(name, pattern) for pattern in settings.no_weight_decay)

    optimizer = torch.optim.AdamW(
        [
            {"params": [leaf], "weight_decay": settings.weight_decay if decays(name) else 0.0}
            for name, leaf in leaves.items()
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    norms = []
    for number in range(NUM_STEPS):
        if number == left_out:
            continue
        batch = samples_of(config, number * BATCH_SIZE, BATCH_SIZE, number)
        logits = reference.exit_logits(leaves, config.model, config.exits, batch.tokens_BS)
        weights = weights_at(config, number)
        reference.weighted_loss(logits, batch.labels_BS, batch.mask_BS, weights).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves.values(), settings.clip_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = RATES[number]
        optimizer.step()
        optimizer.zero_grad()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}, norms


def assert_near(measured: Arrays, expected: Arrays, atol: float = 1e-6) -> None:
    """All parameters, by name."""
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, atol=atol, rtol=0, err_msg=name)
