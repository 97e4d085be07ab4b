"""Random initial parameters that depend on the seed and the parameter's name alone, not on how the model is split.

So any layout starts from the same model, and copies of a shared projection start equal.
"""

import hashlib
import math

import torch

from megatron_ee.model.stage import Stage


def initialize(stage: Stage, seed: int) -> None:
    """Fill the stage's parameters: norms 1, matrices normal with `init_std`, smaller by sqrt(2 L) where a matrix
    writes to the residual stream (GPT-2)."""
    std = stage.model.init_std
    residual_std = std / math.sqrt(2 * stage.model.num_layers)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                writes_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                normal = torch.randn(parameter.shape, generator=_generator(seed, name))
                parameter.copy_(normal * (residual_std if writes_residual else std))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
