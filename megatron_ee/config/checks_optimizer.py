"""Rules about the optimizer's backend: what each of them can do beside the rest of a config."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ee.config.schema import Config

Problems = Iterator[tuple[str, str]]


def optimizer_problems(config: "Config") -> Problems:
    """What is wrong between `optimizer.backend` and other fields."""
    backend, parallel = config.optimizer.backend, config.parallel
    if parallel.distributed_optimizer and backend != "megatron":
        instead = "; it shares the state by itself" if backend == "deepspeed" else ""
        yield "parallel.distributed_optimizer", f"true needs optimizer.backend megatron, not {backend}{instead}"
    if backend == "deepspeed":
        yield from _deepspeed_problems(config)
    elif config.optimizer.deepspeed != type(config.optimizer.deepspeed)():
        yield "optimizer.deepspeed", f"needs optimizer.backend deepspeed, not {backend}"


def _deepspeed_problems(config: "Config") -> Problems:
    stage = config.optimizer.deepspeed.stage
    if stage > 1:
        cut = "gradients" if stage == 2 else "gradients and parameters"
        yield (
            "optimizer.deepspeed.stage",
            f"{stage} must be 1: beyond it DeepSpeed cuts up {cut} within a backward of its own, and here the pipeline "
            "runs the backward",
        )
    if config.parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_grad_reduce",
            "true begins sums over data ranks that optimizer.backend deepspeed makes itself, after the backward",
        )
