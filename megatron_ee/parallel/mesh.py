"""The process groups of a run: which rank holds which pipeline stage, which share of each matrix and of the data.

Ranks are numbered as megatron-core does: pipeline stage outermost, then data-parallel rank, tensor-parallel innermost.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ee.config import ParallelConfig
from megatron_ee.device import Device
from megatron_ee.errors import UserError
from megatron_ee.parallel.world import MeshError, data_parallel_size

TIMEOUT = timedelta(minutes=30)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Links:
    """The ranks of one pipeline once more, with a communicator for each kind of message, so that none waits for
    another: activations and gradients that cross between two stages, and those of the way back from the last stage to
    the first where a stage has several chunks."""

    activations: dist.ProcessGroup
    gradients: dist.ProcessGroup
    wrapped_activations: dist.ProcessGroup | None
    wrapped_gradients: dist.ProcessGroup | None

    def choose(self, *, carries_gradients: bool, wraps: bool) -> dist.ProcessGroup:
        """The group of a message. `wraps`: between the last stage and the first."""
        if wraps:
            group = self.wrapped_gradients if carries_gradients else self.wrapped_activations
            assert group is not None, "the mesh was opened for one chunk a stage"
            return group
        return self.gradients if carries_gradients else self.activations


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place among all ranks, and its groups.

    Attributes:
        groups: megatron-core's groups, handed to every part of megatron-core that takes them.
        timeout: how long a message may take, of whatever group.
    """

    device: Device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    groups: ProcessGroupCollection
    links: Links
    timeout: timedelta

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes logs and small files."""
        return self.rank == 0

    @property
    def pipeline_ranks(self) -> list[int]:
        """Global rank of every stage of this pipeline, in stage order."""
        ranks_per_stage = self.data_size * self.tensor_size
        return list(range(self.rank % ranks_per_stage, self.world_size, ranks_per_stage))

    def group_over_stages(self, stages: Sequence[int]) -> dist.ProcessGroup:
        """A new group of those stages of this pipeline. Collective: every rank calls it with the same stages."""
        return _new_group_per_pipeline(stages, self.data_size * self.tensor_size, self.rank, self.timeout)

    def new_message_group(self) -> dist.ProcessGroup:
        """A new group of this pipeline's stages, for small messages between hosts, whatever the device. Collective."""
        per_stage = self.data_size * self.tensor_size
        stages = range(self.pipeline_size)
        return _new_group_per_pipeline(stages, per_stage, self.rank, self.timeout, backend="gloo")

    def new_host_group(self) -> dist.ProcessGroup:
        """A new group of all ranks, for small messages between hosts, whatever the device. Collective."""
        return dist.new_group(list(range(self.world_size)), timeout=self.timeout, backend="gloo")

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place: for figures that each rank holds a part of (zeros elsewhere)."""
        dist.all_reduce(values)
        return values

    def max_over_ranks(self, value: int) -> int:
        """The largest of all ranks' values: what the ranks agree on where each may know something."""
        largest = torch.tensor(value, device=self.device.torch)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Result) -> list[Result]:
        """All ranks' values, by rank. They have to be picklable."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, work: Callable[[], Result]) -> Result:
        """What a function returns on the main rank, which alone calls it; on every rank. It has to be picklable.

        Raises:
            UserError: the function raised it, on the main rank; here on all.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(Result, outcome[0])

    def on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """What a function returns on this rank; every rank calls it.

        Raises:
            UserError: it did so on some rank; here on all, so that none waits for one that has given up.
        """
        result, problem = None, ""
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        if first := next(filter(None, self.gather(problem)), ""):
            raise UserError(first)
        return cast(Result, result)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(device_ids=[self.device.torch.index] if self.device.torch.type == "cuda" else None)


def open_mesh(parallel: ParallelConfig, device: Device, *, timeout: timedelta = TIMEOUT) -> Mesh:
    """Join the other ranks (as torchrun's environment says; alone without one) and build the groups. A process that has
    opened a mesh of this shape gets the same groups again.

    Args:
        timeout: how long a message may take before torch gives up, and with it the process.

    Raises:
        MeshError: see `data_parallel_size`; or the process has a mesh of another shape.
    """
    if not dist.is_initialized():
        if dist.is_torchelastic_launched():
            dist.init_process_group(device.backend, timeout=timeout)
        else:
            dist.init_process_group(device.backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data_size = data_parallel_size(parallel, world_size)
    _open_groups(parallel, timeout)
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # its tracker must exist; parameters are seeded by name
    pipeline_rank, place_in_stage = divmod(rank, data_size * parallel.tensor)
    data_rank, tensor_rank = divmod(place_in_stage, parallel.tensor)
    mesh = Mesh(
        device=device,
        rank=rank,
        world_size=world_size,
        tensor_rank=tensor_rank,
        tensor_size=parallel.tensor,
        pipeline_rank=pipeline_rank,
        pipeline_size=parallel.pipeline,
        data_rank=data_rank,
        data_size=data_size,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        links=_open_links(parallel, data_size * parallel.tensor, rank, timeout),
        timeout=timeout,
    )
    _connect_neighbours(mesh)
    return mesh


def launched_ranks() -> int:
    """How many processes were started together; 1 without a launcher."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def close_mesh() -> None:
    """Leave all groups; the process may open another mesh afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _open_groups(parallel: ParallelConfig, timeout: timedelta) -> None:
    """megatron-core's own, of which a process has one set."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        )
        return
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    if (tensor, pipeline) != (parallel.tensor, parallel.pipeline):
        raise MeshError("parallel", f"this process has a mesh already, of tensor: {tensor} and pipeline: {pipeline}")


def _open_links(parallel: ParallelConfig, ranks_per_stage: int, rank: int, timeout: timedelta) -> Links:
    def new_group() -> dist.ProcessGroup:
        return _new_group_per_pipeline(range(parallel.pipeline), ranks_per_stage, rank, timeout)

    wraps = parallel.chunks > 1
    return Links(new_group(), new_group(), new_group() if wraps else None, new_group() if wraps else None)


def _connect_neighbours(mesh: Mesh) -> None:
    """A first message over each link, pair by pair from the first stage on.

    NCCL connects a pair at its first message and both sides wait for it. Left to the first step, a stage that posts its
    receives ahead would wait for a gradient that it has yet to make possible.
    """
    links, last = mesh.links, mesh.pipeline_size - 1
    for left, right in pairwise(range(mesh.pipeline_size)):
        _exchange(mesh, links.activations, source=left, destination=right)
        _exchange(mesh, links.gradients, source=right, destination=left)
    if links.wrapped_activations is not None and links.wrapped_gradients is not None:
        _exchange(mesh, links.wrapped_activations, source=last, destination=0)
        _exchange(mesh, links.wrapped_gradients, source=0, destination=last)


def _exchange(mesh: Mesh, link: dist.ProcessGroup, *, source: int, destination: int) -> None:
    """A message from one stage to another; the other stages do nothing."""
    token = torch.zeros(1, device=mesh.device.torch)
    if mesh.pipeline_rank == source:
        dist.send(token, dst=mesh.pipeline_ranks[destination], group=link)
    elif mesh.pipeline_rank == destination:
        dist.recv(token, src=mesh.pipeline_ranks[source], group=link)


def _new_group_per_pipeline(
    stages: Sequence[int], ranks_per_stage: int, rank: int, timeout: timedelta, backend: str | None = None
) -> dist.ProcessGroup:
    pipelines = [[stage * ranks_per_stage + place for stage in stages] for place in range(ranks_per_stage)]
    groups = [dist.new_group(members, timeout=timeout, backend=backend) for members in pipelines]
    return groups[rank % ranks_per_stage]
