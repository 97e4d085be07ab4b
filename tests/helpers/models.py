"""Models for tests that need one in this very process."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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
    model: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Stage:
    """The tiny model on one stage, for inference; `model` and `more` are fields of the sections `model` and `exits`."""
    config = tiny_config(model=dict(model), exits={"layers": exits, "head": head, **more})
    (chunks,) = place(config.model, config.exits, config.parallel)
    stage = Stage(
        config.model, config.exits, chunks, vocab_size=VOCAB_SIZE, groups=mesh.groups, device=mesh.device, dtype=dtype
    )
    initialize(stage, 0)
    return stage.eval().requires_grad_(False)
