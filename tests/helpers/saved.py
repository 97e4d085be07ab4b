"""Checkpoints of random models of ours, without training."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from helpers.tiny import tiny_config
from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.checkpoint.saver import Saver
from megatron_ee.checkpoint.sharded import model_state
from megatron_ee.config import Config, to_yaml
from megatron_ee.model.initialize import initialize
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.mesh import Mesh

VOCAB_SIZE = 320
"""More than the tokenizer, which is of bytes, has: the rest is padding."""


def save_random_run(
    folder: Path,
    mesh: Mesh,
    precision: str = "fp32",
    model: Mapping[str, Any] = MappingProxyType({}),
    **exits: Any,
) -> tuple[Config, Stage]:
    """A run of the tiny model with one checkpoint, at step 7; norms and biases are random too."""
    config = tiny_config(
        name=folder.name,
        model={"vocab_size": VOCAB_SIZE, **model},
        exits={"weight_schedule": {"shape": "constant"}, **exits},
        training={"precision": precision},
    )
    (chunks,) = place(config.model, config.exits, config.parallel)
    stage = Stage(
        config.model,
        config.exits,
        chunks,
        vocab_size=VOCAB_SIZE,
        groups=mesh.groups,
        device=mesh.device,
        dtype=DTYPES[config.training.precision],
    )
    initialize(stage, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    description = Description(
        config.model, config.exits, config.training.precision, "bytes", VOCAB_SIZE, Progress(7, 28)
    )
    saver = Saver(folder, mesh, {"config.yaml": to_yaml(config).encode()})
    saver.start(lambda: {"model": model_state(stage, mesh)}, description, copies=False)
    saver.finish()
    return config, stage.eval().requires_grad_(False)
