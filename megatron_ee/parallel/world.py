"""How many processes a config needs, and what share of a batch each gets: arithmetic, without any process."""

from megatron_ee.config import Config, ParallelConfig
from megatron_ee.errors import FieldError


class MeshError(FieldError):
    """The processes that were started do not fit the config's `parallel` section."""


def check_world(config: Config, world_size: int) -> None:
    """
    Raises:
        MeshError: the config cannot be run by `world_size` processes.
    """
    data_size = data_parallel_size(config.parallel, world_size)
    training = config.training
    num_microbatches = count_microbatches(training.global_batch_size, training.micro_batch_size, data_size)
    check_microbatches(config.parallel, num_microbatches)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """How many data-parallel ranks `world_size` processes make.

    Raises:
        MeshError: the processes don't divide into pipelines, or are not as many as the config says.
    """
    tensor, pipeline = parallel.tensor, parallel.pipeline
    stages = f"{pipeline} stage{'s' * (pipeline > 1)}" + (f" of {tensor} tensor-parallel ranks" if tensor > 1 else "")
    data_size, left_over = divmod(world_size, tensor * pipeline)
    if left_over:
        field = "parallel.pipeline" if pipeline > 1 else "parallel.tensor"
        processes = "1 process doesn't" if world_size == 1 else f"{world_size} processes don't"
        raise MeshError(field, f"{processes} divide into {stages}")
    if parallel.data not in ("auto", data_size):
        wanted = int(parallel.data) * tensor * pipeline
        raise MeshError("parallel.data", f"{parallel.data} x {stages} need {wanted} processes, not {world_size}")
    return data_size


def count_microbatches(global_batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """Micro-batches of one pipeline in a step.

    Raises:
        MeshError: the global batch doesn't divide over data-parallel ranks and micro-batches.
    """
    across = micro_batch_size * data_size
    if global_batch_size % across:
        raise MeshError(
            "training.global_batch_size",
            f"{global_batch_size} must be a multiple of micro_batch_size x data-parallel ranks = "
            f"{micro_batch_size} x {data_size}",
        )
    return global_batch_size // across


def check_microbatches(parallel: ParallelConfig, num_microbatches: int) -> None:
    """
    Raises:
        MeshError: the schedule cannot run so many micro-batches.
    """
    if parallel.goes_in_rounds and num_microbatches % parallel.pipeline:
        raise MeshError(
            "training.global_batch_size",
            f"makes {num_microbatches} micro-batches a step, but schedule {parallel.schedule} needs a multiple of the "
            f"{parallel.pipeline} stages",
        )
