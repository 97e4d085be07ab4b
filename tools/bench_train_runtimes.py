"""The trainer's runtime against megatron-core's own schedules, on the same stages: two processes over gloo.

Only what executes the micro-batches differs: stage, losses, gradients and optimizer are the very same objects.
"""

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from bench_gpu import build
from bench_ranks import run_on_ranks
from bench_report import Measure, Rounds, measure_of, take_turns
from bench_train_memory import memory_measures, worst_of
from bench_train_setup import Sizes, config_of, context_of, random_batch

from megatron_ee.device import choose_device

if TYPE_CHECKING:
    from megatron_ee.data.batch import Batch
    from megatron_ee.parallel.mesh import Mesh
    from megatron_ee.training.trainer import Trainer

_NUM_STAGES = 2
_GOALS = {"1f1b": 1.0, "interleaved": 0.98}


def runtime_measures(sizes: Sizes) -> list[Measure]:
    """Tokens per second over those of megatron-core's 1F1B and interleaved schedule, with exits; then the memory that
    exits take on each of two stages."""
    by_rank = run_on_ranks(_NUM_STAGES, _measure, sizes)
    tokens = sizes.num_pipelined_microbatches * sizes.micro_batch_size * sizes.sequence_length
    measures = []
    for schedule, rounds in by_rank[0].rounds.items():
        tokens_per_s = tokens / statistics.median(rounds.a)
        more = {"exits": sizes.two_exits, "num_stages": _NUM_STAGES, "clock": "wall", "tokens_per_s": tokens_per_s}
        name, goal = f"runtime_over_megatron_{schedule}", _GOALS[schedule]
        measures.append(measure_of(name, rounds.paired, "higher", rounds.aa, context_of(sizes, **more), goal=goal))
    return measures + worst_of([measured.memory for measured in by_rank])


class _Measured(NamedTuple):
    """By one rank; rounds by schedule."""

    rounds: dict[str, Rounds]
    memory: list[Measure]


def _measure(sizes: Sizes) -> _Measured:
    from megatron_ee.parallel.mesh import open_mesh

    # links of several chunks serve one chunk, too: one mesh for all
    parallel = config_of(sizes, num_microbatches=sizes.num_pipelined_microbatches, **_parallel("interleaved")).parallel
    mesh = open_mesh(parallel, choose_device("cpu"))
    rounds = {schedule: _compare(sizes, schedule, mesh) for schedule in _GOALS}
    return _Measured(rounds, memory_measures(sizes, mesh))


def _compare(sizes: Sizes, schedule: str, mesh: "Mesh") -> Rounds:
    """Steps by the runtime, and by megatron-core's schedule."""
    from megatron_ee.training.assemble import build_runtime, message_between_stages

    own, other = (
        config_of(
            sizes,
            sizes.two_exits,
            num_microbatches=sizes.num_pipelined_microbatches,
            **_parallel(schedule) | {"schedule": name},
        )
        for name in (schedule, "megatron")
    )
    trainer, batch = build(own, mesh), random_batch(own)
    message = message_between_stages(other, mesh.device)
    runtime = build_runtime(other, mesh, message, trainer.stage, trainer.gradients)
    reference = replace(trainer, config=other, runtime=runtime)
    return take_turns(sizes.rounds, lambda: _wall_seconds(trainer, batch), lambda: _wall_seconds(reference, batch))


def _parallel(schedule: str) -> dict[str, Any]:
    return {"pipeline": _NUM_STAGES, "schedule": schedule, "chunks": 2 if schedule == "interleaved" else 1}


def _wall_seconds(trainer: "Trainer", batch: "Batch") -> float:
    """Of a step, from the moment when all ranks are there until all are done."""
    trainer.mesh.barrier()
    started = time.perf_counter()
    trainer.train_step(batch, 0)
    trainer.mesh.barrier()
    return time.perf_counter() - started
