"""What an optimizer's backend keeps, in bytes on each rank."""

from dataclasses import dataclass

from megatron_ee.config import Config

FP32 = 4  # bytes of a gradient, a moment or a master weight
MOMENTS = 2  # AdamW's


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """
    Attributes:
        device: moments and master weights, where the model is.
        host: where they are offloaded, they and what the update takes besides, in the host's memory.
    """

    device: int
    host: int = 0


def optimizer_memory(config: Config, trained: int, *, size: int, data_size: int) -> OptimizerMemory:
    """
    Args:
        trained: parameters of one rank.
        size: bytes of a parameter.
    """
    optimizer = config.optimizer
    is_zero = optimizer.backend == "deepspeed"
    has_masters = size < FP32 or is_zero  # DeepSpeed has a copy of its share in fp32 too
    shared_by = data_size if is_zero or config.parallel.distributed_optimizer else 1
    kept = trained * FP32 * (MOMENTS + has_masters) // shared_by
    if is_zero and optimizer.deepspeed.offload == "cpu":
        # and there the gradients of the share, and its updated parameters on their way back
        return OptimizerMemory(0, kept + trained * (FP32 + size) // shared_by)
    return OptimizerMemory(kept)
