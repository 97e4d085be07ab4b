"""The process groups of a run: which rank holds which pipeline stage and which share of the data.

Ranks are numbered as megatron-core does: pipeline stage outermost, data-parallel rank innermost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ee.config import ParallelConfig
from megatron_ee.device import Device
from megatron_ee.parallel.world import data_parallel_size


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place among all ranks, and its groups.

    Attributes:
        groups: megatron-core's groups, handed to every part of megatron-core that takes them.
        forward_link, backward_link: the ranks of this pipeline once more, a communicator for each direction, so
            that an activation and a gradient that cross between two stages never wait for each other.
    """

    device: Device
    rank: int
    world_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    groups: ProcessGroupCollection
    forward_link: dist.ProcessGroup
    backward_link: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes logs and small files."""
        return self.rank == 0

    @property
    def pipeline_ranks(self) -> list[int]:
        """Global rank of every stage of this pipeline, in stage order."""
        return [stage * self.data_size + self.data_rank for stage in range(self.pipeline_size)]

    def group_over_stages(self, stages: Sequence[int]) -> dist.ProcessGroup:
        """A new group of those stages of this pipeline. Collective: every rank calls it with the same stages."""
        return _new_group_per_pipeline(stages, self.data_size, self.data_rank)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place: for figures that each rank holds a part of (zeros elsewhere)."""
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(device_ids=[self.device.torch.index] if self.device.torch.type == "cuda" else None)


def open_mesh(parallel: ParallelConfig, device: Device) -> Mesh:
    """Join the other ranks (as torchrun's environment says; alone without one) and build the groups.

    Raises:
        MeshError: see `data_parallel_size`.
    """
    if not dist.is_initialized():
        if dist.is_torchelastic_launched():
            dist.init_process_group(device.backend)
        else:
            dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data_size = data_parallel_size(parallel, world_size)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=parallel.pipeline, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # its tracker must exist; parameters are seeded by name
    pipeline_rank, data_rank = divmod(rank, data_size)
    stages = range(parallel.pipeline)
    mesh = Mesh(
        device=device,
        rank=rank,
        world_size=world_size,
        pipeline_rank=pipeline_rank,
        pipeline_size=parallel.pipeline,
        data_rank=data_rank,
        data_size=data_size,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        forward_link=_new_group_per_pipeline(stages, data_size, data_rank),
        backward_link=_new_group_per_pipeline(stages, data_size, data_rank),
    )
    _connect_neighbours(mesh)
    return mesh


def close_mesh() -> None:
    """Leave all groups; the process may open another mesh afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _connect_neighbours(mesh: Mesh) -> None:
    """A first message over each link, pair by pair from the first stage on.

    NCCL connects a pair at its first message and both sides wait for it. Left to the first step, a stage that posts its
    receives ahead would wait for a gradient that it has yet to make possible.
    """
    token = torch.zeros(1, device=mesh.device.torch)
    for left, right in pairwise(range(mesh.pipeline_size)):
        ends = {left: mesh.pipeline_ranks[right], right: mesh.pipeline_ranks[left]}
        if mesh.pipeline_rank in ends:
            peer = ends[mesh.pipeline_rank]
            for link, source in ((mesh.forward_link, left), (mesh.backward_link, right)):
                if mesh.pipeline_rank == source:
                    dist.send(token, dst=peer, group=link)
                else:
                    dist.recv(token, src=peer, group=link)


def _new_group_per_pipeline(stages: Sequence[int], data_size: int, data_rank: int) -> dist.ProcessGroup:
    ranks = [[stage * data_size + pipeline for stage in stages] for pipeline in range(data_size)]
    return [dist.new_group(members) for members in ranks][data_rank]
