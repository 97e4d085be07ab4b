"""Peak memory of a training step with exits over that without, beyond what exits must add.

They must add their heads, with gradients and both moments of the optimizer, and the gradient of the hidden state at
each exit while its micro-batch is in flight. All else that a rank holds counts on both sides, from its parameters on.
"""

import gc
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bench_gpu import build
from bench_report import Measure, measure_of
from bench_train_setup import Sizes, config_of, context_of, random_batch
from live_bytes import peak_bytes

if TYPE_CHECKING:
    from megatron_ee.config import Config
    from megatron_ee.parallel.mesh import Mesh
    from megatron_ee.training.trainer import Trainer

_FP32 = 4
_COPIES = 4  # a parameter, its gradient, two moments


class Peak(NamedTuple):
    """Of one stage: bytes at the peak, the parameters that it has, its early exits, and micro-batches in flight."""

    num_bytes: int
    num_parameters: int
    num_exits: int
    in_flight: int


def memory_measures(sizes: Sizes, mesh: "Mesh") -> list[Measure]:
    """Of this stage of one pipeline stage, or of two, by the mesh: exits at two depths, and on every layer."""
    suffix = "" if mesh.pipeline_size == 1 else f"_{mesh.pipeline_size}_stages"
    peak = partial(_peak_of_a_step, sizes, mesh=mesh)
    without, again = peak(()), peak(())
    measures = []
    for name, exits in (("exits", sizes.two_exits), ("every_layer", sizes.all_exits)):
        having, releasing = peak(exits), peak(exits, release=True)
        details = {
            "exits": exits,
            "stage": mesh.pipeline_rank,
            "bytes_without": without.num_bytes,
            "bytes_with": having.num_bytes,
            "bytes_allowed": _allowance(sizes, without, having),
            "ratio_with_release": _ratio(sizes, without, releasing),
            "ratio_with_all_that_exits_add": having.num_bytes / without.num_bytes,
        }
        aa = again.num_bytes / without.num_bytes
        context = context_of(sizes, **details)
        ratio = _ratio(sizes, without, having)
        measures.append(measure_of(f"peak_memory_ratio_{name}{suffix}", [ratio], "lower", aa, context, goal=1.03))
    return measures


def worst_of(by_stage: list[list[Measure]]) -> list[Measure]:
    """Each measure from the stage where it is highest; the values of all in its context."""
    worst = []
    for measures in zip(*by_stage, strict=True):
        highest = max(measures, key=lambda measure: measure.value)
        values = [measure.value for measure in measures]
        worst.append(replace(highest, context=highest.context | {"by_stage": values}))
    return worst


def _peak_of_a_step(sizes: Sizes, exits: tuple[int, ...], *, mesh: "Mesh", release: bool = False) -> Peak:
    """The second step's: the first one makes the optimizer's state."""
    config = _config(sizes, exits, mesh.pipeline_size, release)
    batch = random_batch(config)
    trainers: list[Trainer] = []

    def prepare() -> None:
        trainers.append(build(config, mesh))
        trainers[0].train_step(batch, 0)
        gc.collect()

    num_bytes = peak_bytes(lambda: trainers[0].train_step(batch, 1), before=prepare)
    stage = trainers[0].stage
    num_parameters = sum(parameter.numel() for parameter in stage.parameters())
    num_exits = sum(int(layer) in exits for layer in stage.exits)
    in_flight = min(
        mesh.pipeline_size - mesh.pipeline_rank, config.training.global_batch_size // sizes.micro_batch_size
    )
    trainers.clear()
    gc.collect()
    return Peak(num_bytes, num_parameters, num_exits, in_flight)


def _config(sizes: Sizes, exits: tuple[int, ...], num_stages: int, release: bool) -> "Config":
    """Stages of as many layers, whatever exits they have."""
    layout: Any = [{"layers": sizes.num_layers // num_stages}] * num_stages
    config = config_of(
        sizes, exits, num_microbatches=sizes.num_pipelined_microbatches, pipeline=num_stages, layout=layout
    )
    return config.model_copy(update={"exits": config.exits.model_copy(update={"release": release})})


def _ratio(sizes: Sizes, without: Peak, having: Peak) -> float:
    return (having.num_bytes - _allowance(sizes, without, having)) / without.num_bytes


def _allowance(sizes: Sizes, without: Peak, having: Peak) -> int:
    hidden = sizes.sequence_length * sizes.micro_batch_size * sizes.hidden_size
    heads = (having.num_parameters - without.num_parameters) * _COPIES
    return _FP32 * (heads + having.num_exits * having.in_flight * hidden)
