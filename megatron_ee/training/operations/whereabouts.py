"""What a rank is at, where the other ranks of its machine can see it, also after it has been killed.

Each rank has a record in a file that all of them map into their memory; it costs a microsecond to change. Written by
its own rank alone, and read where it has not changed for long, or where its writer is gone.
"""

import errno
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ee.parallel.pipeline.plan import Action, Kind

_ABOUT = struct.Struct("<iiii")  # process, rank, pipeline stage, 1 once it may go
_NOW = struct.Struct("<dqiii16s")  # since when (s), iteration, kind (-1: none), chunk, micro-batch, phase
_SIZE = mmap.PAGESIZE
_KINDS = tuple(Kind)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a rank was at.

    Attributes:
        since: when that began, in seconds of the machine's monotonic clock.
        iteration: counted from 1; 0 before the first.
        action: of the plan, None between two.
        is_over: whether it has said that it ends.
    """

    pid: int
    rank: int
    stage: int
    is_over: bool
    since: float
    iteration: int
    phase: str
    action: Action | None

    def describe(self, now: float) -> str:
        """One line; `now` is by the clock of `since`."""
        what = self.phase
        if self.action is not None:
            chunk = f", chunk {self.action.chunk}" if self.action.chunk else ""
            what = f"{self.action.kind} of micro-batch {self.action.microbatch}{chunk}"
        return (
            f"rank {self.rank} (stage {self.stage}): iteration {self.iteration}, {what}, for {now - self.since:.1f} s"
        )


class Whereabouts:
    """This rank's record: an `ActionWatch`, told of everything else by `enter`.

    Args:
        memory: where the record is; None: nobody else is to see it.
    """

    def __init__(self, *, rank: int = 0, stage: int = 0, memory: mmap.mmap | None = None) -> None:
        self._memory = memory if memory is not None else mmap.mmap(-1, _SIZE)
        self._about = (os.getpid(), rank, stage)
        self._iteration, self._phase = 0, b""
        _ABOUT.pack_into(self._memory, 0, *self._about, 0)
        self.enter("start")

    def enter(self, phase: str, iteration: int | None = None) -> None:
        """Go on to another part of a step, or to what comes between two; `iteration` counts from 1."""
        self._iteration = self._iteration if iteration is None else iteration
        self._phase = phase.encode()
        self._write(-1, 0, 0)

    def begin(self, action: Action) -> None:
        self._write(_NUMBERS[action.kind], action.chunk, action.microbatch)

    def end(self, action: Action) -> None:
        self._write(-1, 0, 0)

    def leave(self) -> None:
        """The rank has said what there is to say, and nobody needs to miss it."""
        _ABOUT.pack_into(self._memory, 0, *self._about, 1)

    def see(self) -> Sighting:
        """The record as others see it."""
        return _see(self._memory)

    def _write(self, kind: int, chunk: int, microbatch: int) -> None:
        _NOW.pack_into(
            self._memory, _ABOUT.size, time.monotonic(), self._iteration, kind, chunk, microbatch, self._phase
        )


class Board:
    """The records of the ranks of one machine.

    Args:
        folder: one that only this machine has: a mapped file of a network's would cost more, and may be gone.
    """

    def __init__(self, folder: Path, num_ranks: int) -> None:
        self.folder = folder
        self._paths = [folder / str(local_rank) for local_rank in range(num_ranks)]
        self._memories: list[mmap.mmap] = []

    def join(self, local_rank: int, *, rank: int, stage: int) -> Whereabouts:
        """Open this rank's own record. All ranks do, before any of them looks.

        Raises:
            OSError: there is no room for it, or the folder is somebody else's.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.lstat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "is another user's", str(self.folder))
        # Written, not only made longer: the first change of a page that the disk has no room for ends the process.
        self._paths[local_rank].write_bytes(bytes(_SIZE))
        return Whereabouts(rank=rank, stage=stage, memory=_map(self._paths[local_rank]))

    def look(self) -> Sequence[Sighting]:
        """All of them, by local rank."""
        if not self._memories:
            self._memories = [_map(path) for path in self._paths]
        return [_see(memory) for memory in self._memories]

    def clear(self) -> None:
        """Remove the files; who has looked before still sees them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_board() -> Board:
    """That of the ranks which the same torchrun has started, or of this process alone."""
    is_under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    leader = os.getppid() if is_under_torchrun else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"megatron_ee-{os.getuid()}-{leader}"
    return Board(folder, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _SIZE)


def _see(memory: mmap.mmap) -> Sighting:
    pid, rank, stage, is_over = _ABOUT.unpack_from(memory, 0)
    since, iteration, kind, chunk, microbatch, phase = _NOW.unpack_from(memory, _ABOUT.size)
    action = Action(_KINDS[kind], stage, chunk, microbatch) if kind >= 0 else None
    return Sighting(pid, rank, stage, bool(is_over), since, iteration, phase.rstrip(b"\0").decode(), action)
