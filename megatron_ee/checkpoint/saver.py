"""Saves a run's checkpoints: a moment for a copy, and the rest while training goes on."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_ee.checkpoint.description import Description, write_description
from megatron_ee.checkpoint.folders import PLAIN_VALUES_FILE, is_whole, link_latest, step_folder
from megatron_ee.checkpoint.plans import SavePlans
from megatron_ee.checkpoint.staging import Staging
from megatron_ee.checkpoint.writing import BackgroundWriting, Item, Written, write_metadata
from megatron_ee.errors import UserError
from megatron_ee.parallel.mesh import Mesh

_POLL_S = 0.2


class SaveError(UserError):
    """A checkpoint could not be written: no room, no permission, a disk that fails. All ranks raise it together."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save under way; on a rank that could not begin, `writing` says why."""

    folder: Path
    description: Description
    writing: BackgroundWriting | str

    def wait(self, seconds: float = 0) -> bool:
        return isinstance(self.writing, str) or self.writing.wait(seconds)

    def outcome(self) -> Written | str:
        if isinstance(self.writing, str):
            return self.writing
        try:
            return self.writing.result()
        except OSError as error:
            return str(error)
        except Exception as error:  # whatever it is, it has to get to all ranks
            return f"{type(error).__name__}: {error}"


class Saver:
    """Writes step folders, one at a time. Every rank calls the same methods in the same order.

    Args:
        run: the run's folder.
        files: name -> content of what a step folder needs beside the state, to stand alone.
    """

    def __init__(self, run: Path, mesh: Mesh, files: Mapping[str, bytes]) -> None:
        self._run, self._mesh, self._files = run, mesh, files
        self._plans, self._staging = SavePlans(mesh), Staging(mesh.device)
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a save was started and not finished: the same on all ranks."""
        return self._pending is not None

    def is_writing(self) -> bool:
        """Whether this rank still writes; others may be slower or faster."""
        return self._pending is not None and not self._pending.wait()

    def start(self, state: Callable[[], ShardedStateDict], description: Description, *, copies: bool) -> None:
        """Begin to save a moment, unless it is saved already. `finish` has to come before the next one.

        Args:
            state: gives shards (see `model_state`), and plain values that all ranks agree on. Collective.
            copies: whether the state is copied, and may change afterwards; otherwise not before `finish`.

        Raises:
            SaveError: the folder cannot be made.
        """
        assert self._pending is None, "a save is under way"
        folder = step_folder(self._run, description.progress.iteration)
        if not self._mesh.from_main(lambda: self._prepare(folder)):
            return
        self._pending = _Pending(folder, description, self._begin_to_write(folder, state(), copies=copies))

    def finish(self) -> Path | None:
        """Wait until all ranks have written, and make it a checkpoint; returns its folder, or None without a save.

        Raises:
            SaveError: a rank could not write. What there is of the folder is removed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        while self._mesh.max_over_ranks(int(not pending.wait(_POLL_S))):
            pass  # one that waits in a collective operation for a slow disk would run into its time limit
        outcomes: list[Written | str] = [""] * self._mesh.world_size
        dist.gather_object(pending.outcome(), outcomes if self._mesh.is_main else None)
        self._mesh.from_main(lambda: self._complete(pending, outcomes))
        return pending.folder

    def _prepare(self, folder: Path) -> bool:
        """Make an empty folder; False if it is a checkpoint already. The main rank's: others may see it later."""
        try:
            if is_whole(folder):
                return False
            if folder.exists():
                shutil.rmtree(folder)  # what a killed save left
            folder.mkdir(parents=True)
        except OSError as error:
            raise SaveError(f"{folder} cannot be made: {error}") from error
        return True

    def _begin_to_write(self, folder: Path, state: ShardedStateDict, *, copies: bool) -> BackgroundWriting | str:
        share = self._plans.share(state)
        files = {PLAIN_VALUES_FILE: share.common, **self._files} if self._mesh.is_main else {}
        try:
            items = self._copy(share.items) if copies else share.items
            return BackgroundWriting(folder, f"__{self._mesh.rank}_", items, files)
        except RuntimeError as error:  # no memory for the copy, or for a thread
            return str(error)

    def _copy(self, items: Sequence[Item]) -> list[Item]:
        tensors = iter(self._staging.copy([data for _, data in items if isinstance(data, torch.Tensor)]))
        return [(item, next(tensors) if isinstance(data, torch.Tensor) else data) for item, data in items]

    def _complete(self, pending: _Pending, outcomes: Sequence[Written | str]) -> None:
        """The last steps, which only the main rank does."""
        folder = pending.folder
        problems = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if not problems:
            try:
                assert self._plans.metadata is not None
                written = [outcome for outcome in outcomes if isinstance(outcome, Written)]
                checksums = write_metadata(folder, self._plans.metadata, written)
                write_description(folder, replace(pending.description, files=checksums))
            except OSError as error:
                problems = [str(error)]
        if problems:
            shutil.rmtree(folder, ignore_errors=True)
            raise SaveError(f"{folder} cannot be written: {'; '.join(problems)}")
        link_latest(folder)
