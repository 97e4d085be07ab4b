"""Which checkpoint a run goes on from: the newest that is whole and undamaged."""

import logging
from pathlib import Path

from megatron_ee.checkpoint.folders import CheckpointError, DamagedError, link_latest, set_aside, whole_checkpoints
from megatron_ee.checkpoint.verify import verify
from megatron_ee.parallel.mesh import Mesh


class ResumableCheckpoints:
    """A run's checkpoints, of which it wants the newest good one. All ranks call the same methods together.

    A damaged one is renamed, so that no later start falls for it and its iteration can be saved again; with a warning,
    because the run repeats what came after the one before. A run whose checkpoints are all damaged doesn't begin anew
    by itself.

    Args:
        verifies: whether files are read and compared with what was saved. Those of shards are not here, but when they
            are loaded.
    """

    def __init__(self, run: Path, mesh: Mesh, *, verifies: bool) -> None:
        self._run, self._mesh, self._verifies = run, mesh, verifies
        self._passed_over: set[Path] = set()

    def newest(self) -> Path | None:
        """The newest without known damage, or None for a run that has none.

        Raises:
            CheckpointError: all are damaged, or the newest is of another format version or cannot be read.
        """
        while True:
            newest = self._mesh.from_main(self._newest)
            if newest is None:
                return None
            try:
                verify(newest, self._mesh, reads="all but shards" if self._verifies else "nothing")
            except DamagedError as error:
                self.pass_over(newest, error)
            else:
                return newest

    def pass_over(self, folder: Path, error: DamagedError) -> None:
        """Say that it is damaged."""
        self._passed_over.add(folder)
        if self._mesh.is_main:
            _set_aside(folder, error)

    def accept(self, folder: Path) -> None:
        """Say that the run goes on from it."""
        if self._mesh.is_main:
            link_latest(folder)  # it may point at a damaged one, or at none if the run was killed before it did

    def _newest(self) -> Path | None:
        """Of one process: others may be shown another state of a shared file system."""
        run = self._run
        steps = {step: folder for step, folder in whole_checkpoints(run).items() if folder not in self._passed_over}
        if steps:
            return steps[max(steps)]
        damaged = [*self._passed_over, *(run / "checkpoints").glob("damaged_*")]
        if damaged:
            raise CheckpointError(
                f"{run / 'checkpoints'} holds damaged checkpoints and no good one. To begin anew, move them away or "
                f"choose another name; checkpoint.verify=false takes the files of one as they are"
            )
        return None


def _set_aside(folder: Path, error: DamagedError) -> None:
    log = logging.getLogger("megatron_ee")
    try:
        log.warning("%s. It is renamed to %s, and the run goes back to the checkpoint before", error, set_aside(folder))
    except OSError as problem:
        log.warning("%s. It cannot be renamed (%s). The run goes back to the checkpoint before", error, problem)
