"""Random initial parameters that depend on the seed and the parameter's name alone, not on how the model is split.

So any layout starts from the same model, and copies of a shared projection start equal.
"""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_ee.model.stage import Stage


def initialize(stage: Stage, seed: int) -> None:
    """Fill the stage's parameters: norms 1, biases 0, matrices normal with `init_std`, smaller by sqrt(2 L) where a
    matrix writes to the residual stream (GPT-2)."""
    std = stage.model.init_std
    residual_std = std / math.sqrt(2 * stage.model.num_layers)
    state = stage.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    apply_factories(state)  # a matrix of two halves, each split over tensor-parallel ranks, becomes two shards
    shards = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    assert sum(shard.data.numel() for shard in shards) == sum(parameter.numel() for parameter in stage.parameters())
    with torch.no_grad():
        for shard in shards:
            if len(shard.global_shape) == 1:
                shard.data.fill_(0.0 if shard.key.endswith(".bias") else 1.0)
            else:
                writes_residual = shard.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
                whole = torch.randn(shard.global_shape, generator=_generator(seed, shard.key))
                shard.data.copy_(whole[shard.global_slice()] * (residual_std if writes_residual else std))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
