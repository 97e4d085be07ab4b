"""The trainer's runtime against megatron-core's own schedules, on the same stages: two processes over gloo.

Only what executes the micro-batches differs: stage, losses, gradients and optimizer are the very same objects.
"""

import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from bench_gpu import build
from bench_report import Measure, Rounds, measure_of, take_turns
from bench_train_memory import memory_measures, worst_of
from bench_train_setup import Sizes, config_of, context_of, random_batch

from megatron_ee.device import choose_device
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:
    from megatron_ee.data.batch import Batch
    from megatron_ee.training.trainer import Trainer

_NUM_STAGES = 2
_TIMEOUT = timedelta(minutes=5)


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each rank of a gloo group: processes of one thread each.

    Raises:
        RuntimeError: a rank has failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(target=_serve, args=(theirs, rank, world_size, folder, function, args))
            for rank, (_, theirs) in enumerate(ends)
        ]
        for rank in ranks:
            rank.start()
        for _, theirs in ends:
            theirs.close()
        try:
            return [ours.recv() for ours, _ in ends]
        except EOFError as error:
            raise RuntimeError("a rank of the bench has failed") from error
        finally:
            for rank in ranks:
                rank.join(timeout=10)
                rank.kill()


def runtime_measures(sizes: Sizes) -> list[Measure]:
    """Tokens per second over those of megatron-core's 1F1B and interleaved schedule, with exits; then the memory that
    exits take on each of two stages."""
    measures = []
    for schedule, chunks, goal in (("1f1b", 1, 1.0), ("interleaved", 2, 0.98)):
        rounds = run_on_ranks(_NUM_STAGES, _compare, sizes, schedule, chunks)[0]
        tokens = sizes.num_pipelined_microbatches * sizes.micro_batch_size * sizes.sequence_length
        context = context_of(
            sizes,
            exits=sizes.two_exits,
            num_stages=_NUM_STAGES,
            clock="wall",
            tokens_per_s=tokens / statistics.median(rounds.a),
        )
        name = f"runtime_over_megatron_{schedule}"
        measures.append(measure_of(name, rounds.paired, "higher", rounds.aa, context, goal=goal))
    return measures + worst_of(run_on_ranks(_NUM_STAGES, _measure_memory, sizes))


def _serve(connection: Any, rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    quiet_dependencies()
    choose_device("cpu")
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    connection.send(function(*args))
    connection.close()
    dist.barrier()
    dist.destroy_process_group()


def _compare(sizes: Sizes, schedule: str, chunks: int) -> Rounds:
    """On each rank: steps by the runtime, and by megatron-core's schedule."""
    from megatron_ee.parallel.mesh import open_mesh
    from megatron_ee.training.assemble import build_runtime, message_between_stages

    num_microbatches, parallel = sizes.num_pipelined_microbatches, {"pipeline": _NUM_STAGES, "chunks": chunks}
    own, other = (
        config_of(sizes, sizes.two_exits, num_microbatches=num_microbatches, schedule=name, **parallel)
        for name in (schedule, "megatron")
    )
    mesh, batch = open_mesh(own.parallel, choose_device("cpu")), random_batch(own)
    trainer = build(own, mesh)
    message = message_between_stages(other, mesh.device)
    runtime = build_runtime(other, mesh, message, trainer.stage, trainer.gradients)
    reference = replace(trainer, config=other, runtime=runtime)
    gc.collect()
    return take_turns(sizes.rounds, lambda: _wall_seconds(trainer, batch), lambda: _wall_seconds(reference, batch))


def _wall_seconds(trainer: "Trainer", batch: "Batch") -> float:
    """Of a step, from the moment when all ranks are there until all are done."""
    trainer.mesh.barrier()
    started = time.perf_counter()
    trainer.train_step(batch, 0)
    trainer.mesh.barrier()
    return time.perf_counter() - started


def _measure_memory(sizes: Sizes) -> list[Measure]:
    from megatron_ee.parallel.mesh import open_mesh

    parallel = config_of(sizes, num_microbatches=sizes.num_pipelined_microbatches, pipeline=_NUM_STAGES).parallel
    return memory_measures(sizes, open_mesh(parallel, choose_device("cpu")))
