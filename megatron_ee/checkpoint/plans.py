"""Which rank writes which shard, and the metadata by which any layout finds them: worked out once, because it is the
same in every save of a run."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_ee.checkpoint.writing import Item
from megatron_ee.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes of a state.

    Attributes:
        items: shards of which this rank has the main copy.
        common: the plain values, as torch.save writes them.
    """

    items: list[Item]
    common: bytes


class SavePlans:
    """Splits states of the same structure into what each rank writes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._local: SavePlan | None = None
        self.metadata: Metadata | None = None
        """Of the last state, on the main rank: names, shapes and offsets, yet without places in files."""

    def share(self, state: ShardedStateDict) -> Share:
        """What this rank writes. Collective; asks others only where the structure has changed on any rank."""
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        planner = MCoreSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(_own_shards(sharded), is_coordinator=self._mesh.is_main)
        plan = planner.create_local_plan()
        if self._mesh.max_over_ranks(int(plan != self._local)):
            self._agree(planner, plan, sharded, common)
        serialized = BytesIO()
        torch.save(common, serialized)
        return Share([(item, planner.resolve_data(item)) for item in plan.items], serialized.getvalue())

    def _agree(self, planner: MCoreSavePlanner, plan: SavePlan, sharded: ShardedStateDict, common: Any) -> None:
        """Check that all shards together are the whole state, once, and gather the metadata."""
        self._local = None
        validate_sharding_integrity(determine_global_metadata(sharded)[1], common_state_dict=common)
        plans: list[SavePlan] | None = [plan] * self._mesh.world_size if self._mesh.is_main else None
        dist.gather_object(plan, plans)
        if plans is not None:
            self.metadata = planner.create_global_plan(plans)[1]
        self._local = plan


def _own_shards(sharded: ShardedStateDict) -> dict[str, Any]:
    """By name, what this rank has the main copy of; in the form that torch.distributed.checkpoint takes."""
    own: dict[str, list[Any]] = {}
    for shard in nested_values(sharded):
        if is_main_replica(shard.replica_id):
            own.setdefault(shard.unique_key if isinstance(shard, ShardedObject) else shard.key, []).append(shard)
    return mcore_to_pyt_state_dict(own)
