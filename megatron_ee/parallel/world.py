"""How many processes a config needs, and what share of a batch each gets: arithmetic, without any process."""

from megatron_ee.config import ParallelConfig
from megatron_ee.errors import UserError


class MeshError(UserError):
    """The processes that were started do not fit the config's `parallel` section."""


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """How many data-parallel ranks `world_size` processes make.

    Raises:
        MeshError: the processes don't divide into pipelines, or are not as many as the config says.
    """
    if world_size % parallel.pipeline:
        raise MeshError(f"parallel.pipeline: {world_size} processes don't divide into {parallel.pipeline} stages")
    data_size = world_size // parallel.pipeline
    if parallel.data not in ("auto", data_size):
        wanted = parallel.pipeline * int(parallel.data)
        raise MeshError(
            f"parallel.data: {parallel.data} x {parallel.pipeline} stages need {wanted} processes, not {world_size}"
        )
    return data_size


def count_microbatches(global_batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """Micro-batches of one pipeline in a step.

    Raises:
        MeshError: the global batch doesn't divide over data-parallel ranks and micro-batches.
    """
    across = micro_batch_size * data_size
    if global_batch_size % across:
        raise MeshError(
            f"training.global_batch_size: {global_batch_size} must be a multiple of micro_batch_size x "
            f"data-parallel ranks = {micro_batch_size} x {data_size}"
        )
    return global_batch_size // across
