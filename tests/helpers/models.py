"""Models for tests that need one in this very process."""

import torch

from helpers.tiny import VOCAB_SIZE, tiny_config
from megatron_ee.model.initialize import initialize
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.mesh import Mesh


def whole_model(
    mesh: Mesh,
    *,
    exits: list[int],
    dtype: torch.dtype = torch.float32,
    head: str | list[str] = "norm",
    norm: str = "own",
) -> Stage:
    """The tiny model on one stage, for inference."""
    config = tiny_config(exits={"layers": exits, "head": head, "norm": norm})
    (chunks,) = place(config.model, config.exits, config.parallel)
    stage = Stage(
        config.model, config.exits, chunks, vocab_size=VOCAB_SIZE, groups=mesh.groups, device=mesh.device, dtype=dtype
    )
    initialize(stage, 0)
    return stage.eval().requires_grad_(False)
