"""Records the steps that `logging.trace_iterations` names, and leaves all others alone.

A recorded step begins with a barrier. Times count from there: on each machine, from the first moment when one of its
ranks was past the barrier. Ranks on one machine read the same clock, so among them times are exact; between machines
they are as exact as a barrier, a fraction of a millisecond.
"""

import logging
import platform
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.recorder import Recorder
from megatron_ee.parallel.pipeline.timeline import Span
from megatron_ee.training.observation.trace import make_trace, write_trace


class Tracer:
    """Collective in the iterations that it records: every rank takes part, those of one pipeline are recorded.

    Args:
        iterations: counted from 1.
        folder: where the main rank writes a file for each.
    """

    def __init__(self, iterations: Collection[int], plan: Plan, mesh: Mesh, folder: Path) -> None:
        self._iterations, self._plan, self._mesh, self._folder = iterations, plan, mesh, folder
        self._is_recorded = mesh.data_rank == mesh.tensor_rank == 0

    @contextmanager
    def step(self, iteration: int) -> Iterator[Sequence[Recorder]]:
        """Around a training step; gives what watches its actions: nothing where nothing is recorded."""
        if iteration not in self._iterations:
            yield ()
            return
        start = self._common_start()
        recorder = Recorder(self._mesh.device)
        yield (recorder,) if self._is_recorded else ()
        times = self._gather(recorder.spans, start)
        if self._mesh.is_main:
            self._write(iteration, times)

    def _common_start(self) -> float:
        """Wait for all ranks; returns the start by this machine's clock."""
        mesh = self._mesh
        mesh.device.synchronize()
        mesh.barrier()
        here = float(zlib.crc32(platform.node().encode()))
        machines_and_clocks = torch.zeros(mesh.world_size, 2, dtype=torch.float64, device=mesh.device.torch)
        machines_and_clocks[mesh.rank] = torch.tensor([here, time.perf_counter()], dtype=torch.float64)
        return min(clock for machine, clock in mesh.sum_over_ranks(machines_and_clocks).tolist() if machine == here)

    def _gather(self, spans: list[Span], start: float) -> list[list[tuple[float, float]]]:
        """Start and end of each stage's actions, in the plan's order."""
        mesh, most = self._mesh, max(map(len, self._plan.actions))
        times = torch.zeros(mesh.pipeline_size, most, 2, dtype=torch.float64, device=mesh.device.torch)
        if self._is_recorded:
            own = [(span.start - start, span.end - start) for span in spans]
            times[mesh.pipeline_rank, : len(own)] = torch.tensor(own, dtype=torch.float64).view(-1, 2)
        gathered: list[list[tuple[float, float]]] = mesh.sum_over_ranks(times).tolist()
        return gathered

    def _write(self, iteration: int, times: list[list[tuple[float, float]]]) -> None:
        """A trace is not worth a run: where it cannot be written, the run goes on without."""
        recorded = [
            [Span(action, start, end) for action, (start, end) in zip(actions, of_stage, strict=False)]
            for actions, of_stage in zip(self._plan.actions, times, strict=True)
        ]
        log, path = logging.getLogger("megatron_ee"), self._folder / f"step_{iteration:08d}.json"
        trace = make_trace(self._plan, recorded, iteration=iteration, world_size=self._mesh.world_size)
        try:
            write_trace(path, trace)
        except OSError as error:
            log.warning("going on without the trace of iteration %d: %s", iteration, error)
        else:
            log.info("traced iteration %d: %s", iteration, path)
