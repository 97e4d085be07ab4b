"""A window of iterations under torch's profiler: RUN/profiles/step_00000100-rank_0.json.gz, which ui.perfetto.dev and
chrome://tracing open.

Beside what torch and CUDA do, a profile has a range for each step ("step 100"), for each phase ("data", "optimizer",
see `phases`), and for each action of the plan under its own name: "F3@0" is F of micro-batch 3 on stage 0, "B3.1@0" its
B on that stage's second chunk.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from megatron_ee.config import ProfileConfig
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.pipeline.plan import Action
from megatron_ee.parallel.pipeline.runtime import ActionWatch


class Profiler:
    """Profiles one pipeline: that of data-parallel rank 0, with tensor-parallel rank 0 of each stage.

    A run that goes on within the window profiles the rest of it; one that ends within leaves what it has at `close`.

    Args:
        window: None: nothing is profiled.
        folder: where each profiled rank writes a file; its number is that of the first iteration in it.
    """

    def __init__(self, window: ProfileConfig | None, mesh: Mesh, folder: Path) -> None:
        is_profiled = window is not None and mesh.data_rank == mesh.tensor_rank == 0
        self._iterations = window.all if window is not None and is_profiled else range(0)
        self._mesh, self._folder = mesh, folder
        self._running: tuple[int, profile] | None = None  # since which iteration

    @contextmanager
    def step(self, iteration: int) -> Iterator[Sequence[ActionWatch]]:
        """Around a training step, counted from 1; gives what marks its actions: nothing where nothing is profiled."""
        if iteration not in self._iterations:
            yield ()
            return
        if self._running is None:
            self._start(iteration)
        with record_function(f"step {iteration}"):
            yield (_ActionRanges(),)
        if iteration == self._iterations[-1]:
            self.close()

    def close(self) -> None:
        """End a profile that is running, and write it. It isn't worth a run: where it can't be written, the run goes on
        without."""
        if self._running is None:
            return
        (first, running), self._running = self._running, None
        running.stop()
        log, path = logging.getLogger("megatron_ee"), self._folder / f"step_{first:08d}-rank_{self._mesh.rank}.json.gz"
        try:
            _export(running, path)
        except (OSError, RuntimeError) as error:
            log.warning("going on without the profile of iteration %d and on: %s", first, error)
        else:
            log.info("profiled from iteration %d on: %s", first, path)

    def _start(self, iteration: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.torch.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._running = iteration, profile(activities=activities)
        self._running[1].start()


class _ActionRanges:
    """An `ActionWatch` that makes each action a range of the profile."""

    def begin(self, action: Action) -> None:
        self._range = record_function(str(action))
        self._range.__enter__()  # type: ignore[no-untyped-call]

    def end(self, action: Action) -> None:
        self._range.__exit__(None, None, None)


def _export(running: profile, path: Path) -> None:
    """So that the file is whole or absent; by its ending torch knows that it is to be compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        running.export_chrome_trace(str(aside))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
