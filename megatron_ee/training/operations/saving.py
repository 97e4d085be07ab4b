"""When saving goes wrong, and what comes after it: a run goes on without a checkpoint, and says so; it doesn't end."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_ee.checkpoint.description import Description
from megatron_ee.checkpoint.folders import step_folder
from megatron_ee.checkpoint.prune import prune
from megatron_ee.checkpoint.saver import SaveError, Saver
from megatron_ee.config import Config, to_yaml
from megatron_ee.parallel.mesh import Mesh


class Saving:
    """A run's checkpoints. Every rank calls the same methods in the same order.

    Args:
        files: name -> content of what a checkpoint needs beside state and config: the tokenizer's.
    """

    def __init__(self, config: Config, run_folder: Path, mesh: Mesh, files: Mapping[str, bytes]) -> None:
        self._config, self._run_folder, self._mesh = config.checkpoint, run_folder, mesh
        self._saver = Saver(run_folder, mesh, {"config.yaml": to_yaml(config).encode(), **files})
        self._pruning: threading.Thread | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a save was started and not settled: the same on all ranks."""
        return self._saver.is_pending

    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._saver.is_writing()

    def start(self, state: Callable[[], dict], description: Description) -> None:
        """Save a moment while training goes on, or before it does, as the config says. A failure is logged.

        Args:
            state: gives what to save. Collective.
        """
        self.settle()
        try:
            self._saver.start(state, description, copies=self._config.asynchronous)
        except SaveError as error:
            self._say(error)
        if not self._config.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way, if any, and make it a checkpoint. A failure is logged."""
        try:
            self._finish()
        except SaveError as error:
            self._say(error)

    def save(self, state: Callable[[], dict], description: Description) -> Path:
        """Save a moment, unless it is saved already; returns its folder.

        Raises:
            SaveError: it could not be written.
        """
        self.settle()
        self._saver.start(state, description, copies=False)
        self._finish()
        self._end_pruning()
        return step_folder(self._run_folder, description.progress.iteration)

    def _finish(self) -> None:
        self._end_pruning()
        if self._saver.finish() is not None and self._mesh.is_main:
            # in a thread: to remove gigabytes takes a while
            self._pruning = threading.Thread(target=prune, args=(self._run_folder, self._config), daemon=True)
            self._pruning.start()

    def _end_pruning(self) -> None:
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None

    def _say(self, error: SaveError) -> None:
        if self._mesh.is_main:
            logging.getLogger("megatron_ee").error("%s; training goes on, and tries again at the next save", error)
