"""Which checkpoints a run keeps, and the removal of the others."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_ee.checkpoint.folders import FORMAT_FILE, whole_checkpoints
from megatron_ee.config import CheckpointConfig


def to_remove(iterations: Iterable[int], *, keep_last: int, keep_every: int) -> list[int]:
    """The iterations, ascending, whose checkpoints go: neither among the newest `keep_last` (0: all stay) nor a
    multiple of `keep_every` (0: none is kept for that)."""
    ascending = sorted(iterations)
    older = ascending[:-keep_last] if keep_last else []
    return [iteration for iteration in older if not (keep_every and iteration % keep_every == 0)]


def prune(run: Path, config: CheckpointConfig) -> None:
    """Remove what the config doesn't keep of a run's whole checkpoints. One process of a run does it, after a save.

    One that cannot be removed stays, with a warning: that is not worth a run.
    """
    folders = whole_checkpoints(run)
    for iteration in to_remove(folders, keep_last=config.keep_last, keep_every=config.keep_every):
        folder = folders[iteration]
        try:
            (folder / FORMAT_FILE).unlink()  # first: a removal that is cut short leaves no checkpoint
            shutil.rmtree(folder)
        except OSError as error:
            logging.getLogger("megatron_ee").warning("%s cannot be removed: %s", folder, error)
