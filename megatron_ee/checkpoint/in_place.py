"""megatron-core's loading, with every shard read into the memory of the tensor that it is a shard of. Its own way reads
whole items into new memory and copies from there, and joins the parts of a tensor in new memory once more."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    FactoryMergeFn,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_ee.checkpoint.reading import ShardReader


class InPlaceStrategy(TorchDistLoadShardedStrategy):
    """Which shard of the checkpoint goes where is megatron-core's plan; the rest of `load` is this.

    Args:
        checksums: see `ShardReader`.
    """

    def __init__(self, checksums: dict[str, str] | None = None) -> None:
        super().__init__()
        self._checksums = checksums

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path | str) -> Any:
        """Fill the tensors of a state; returns it with them in place of their shards. Collective."""
        by_name: dict[str, list[ShardedTensor]] = {}
        exact, padded = [], {}
        for shard in nested_values(sharded_state_dict):
            by_name.setdefault(shard.key, []).append(shard)
            if shard.allow_shape_mismatch:
                padded[shard.key] = shard
            else:
                exact.append(shard)
        planner = MCoreLoadPlanner(shapes_validation_sharded_tensors=exact, allow_shape_mismatch_sharded_tensors=padded)
        state = mcore_to_pyt_state_dict(by_name, is_loading=True)
        load(state, storage_reader=ShardReader(checkpoint_dir, self._checksums), planner=planner)
        return dict_list_map_outplace(lambda shard: shard.data, sharded_state_dict)


def keep_wholes(state: ShardedStateDict) -> None:
    """Let a tensor whose parts are on disk apart (a gate and what it gates) be the whole of them, without joining them
    in new memory, when they were read where they lie in it."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensorFactory):
            entry.merge_fn = partial(_whole_of, entry.data, entry.merge_fn)


def _whole_of(whole: torch.Tensor, merge: FactoryMergeFn, parts: Any) -> torch.Tensor:
    memory = whole.untyped_storage().data_ptr()
    if all(part.untyped_storage().data_ptr() == memory for part in nested_values(parts)):
        return whole
    merged: torch.Tensor = merge(parts)
    return merged
