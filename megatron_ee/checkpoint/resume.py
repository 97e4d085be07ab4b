"""Which checkpoint a run goes on from: the newest that is whole and undamaged."""

import logging
from pathlib import Path

from megatron_ee.checkpoint.folders import CheckpointError, DamagedError, link_latest, set_aside, whole_checkpoints
from megatron_ee.checkpoint.verify import verify
from megatron_ee.parallel.mesh import Mesh


def checkpoint_to_resume(run: Path, mesh: Mesh, *, verifies: bool) -> Path | None:
    """The run's newest good checkpoint, or None for a run that has none. Collective.

    A damaged one is renamed, so that no later start falls for it and its iteration can be saved again; with a warning,
    because the run repeats what came after the one before. A run whose checkpoints are all damaged doesn't begin anew
    by itself.

    Args:
        verifies: whether all files are read and compared with what was saved.

    Raises:
        CheckpointError: all are damaged, or the newest is of another format version or cannot be read.
    """
    passed_over: set[Path] = set()
    while True:
        newest = mesh.from_main(lambda: _newest(run, passed_over))
        if newest is None:
            return None
        try:
            verify(newest, mesh, reads_all=verifies)
        except DamagedError as error:
            passed_over.add(newest)
            if mesh.is_main:
                _pass_over(newest, error)
        else:
            if mesh.is_main:
                link_latest(newest)  # it may point at a damaged one, or at none if the run was killed before it did
            return newest


def _newest(run: Path, passed_over: set[Path]) -> Path | None:
    """Of one process: others may be shown another state of a shared file system."""
    steps = {step: folder for step, folder in whole_checkpoints(run).items() if folder not in passed_over}
    if steps:
        return steps[max(steps)]
    damaged = [*passed_over, *(run / "checkpoints").glob("damaged_*")]
    if damaged:
        raise CheckpointError(
            f"{run / 'checkpoints'} holds damaged checkpoints and no good one. To begin anew, move them away or choose "
            f"another name; checkpoint.verify=false takes the files of one as they are"
        )
    return None


def _pass_over(folder: Path, error: DamagedError) -> None:
    log = logging.getLogger("megatron_ee")
    try:
        log.warning("%s. It is renamed to %s, and the run goes back to the checkpoint before", error, set_aside(folder))
    except OSError as problem:
        log.warning("%s. It cannot be renamed (%s). The run goes back to the checkpoint before", error, problem)
