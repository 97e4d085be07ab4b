"""Ends a job that cannot go on: a rank has died, or has been at one thing for too long.

The others would wait for it, for as long as their messages may take. A thread of every rank looks at the records of
the ranks of its machine (see `whereabouts`). What it finds is said once on each machine, and written to the attempt's
folder, where the other machines of the job look for it. Then all ranks are killed: those that wait, and those that are
stopped, answer nothing else.
"""

import faulthandler
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ee.errors import FieldError, UserError
from megatron_ee.parallel.pipeline.plan import Kind
from megatron_ee.training.operations.attempts import Attempt
from megatron_ee.training.operations.whereabouts import Board, Sighting, Whereabouts, open_board

FAULTY = 70
"""The exit status of a rank that has found a fault (EX_SOFTWARE of sysexits.h)."""

POLL_S = 1.0
_SHOW_STACK = signal.SIGUSR2
_STACKS_S = 0.5  # what the ranks get for showing them
_LAST_WORDS_S = 10.0
_DYING_S = 2.0
_ASLEEP_S = 10.0  # so long without a look: this machine, or the whole job, was suspended

Fault = Literal["died", "hung", "failed", "elsewhere"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong.

    Attributes:
        about: the rank it is about, None where that is on another machine.
    """

    fault: Fault
    about: Sighting | None
    detail: str = ""


class Watchdog:
    """The thread of one rank.

    Args:
        folder: the attempt's, which all machines of the job see.
        hang_timeout: seconds that a rank may spend on one thing; 0: any time.
        beat: what else to do at every look.
    """

    def __init__(self, board: Board, folder: Path, *, hang_timeout: float, beat: Callable[[], None]) -> None:
        self._board, self._folder, self._hang_timeout, self._beat = board, folder, hang_timeout, beat
        self._machine = os.environ.get("GROUP_RANK", "0")
        self._last_look = self._awake_since = time.monotonic()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)

    def start(self) -> None:
        """After all ranks of the machine have joined the board."""
        faulthandler.register(_SHOW_STACK, all_threads=True)
        self._board.look()
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def look(self) -> None:
        """Look once; ends this process where something is wrong."""
        if (finding := self.find()) is not None:
            self.end(finding)

    def look_for_the_lost(self) -> None:
        """Before this rank says that it has failed: a message that cannot come fails too, and then it is the lost rank
        that has to be named. Its connections close a moment before it is seen to be gone."""
        deadline = time.monotonic() + _DYING_S
        while time.monotonic() < deadline:
            self.look()
            time.sleep(0.05)

    def end(self, finding: Finding) -> None:
        """Say what is wrong, if nobody on this machine has yet, and end its ranks, this one last."""
        if not self._may_speak():
            time.sleep(_LAST_WORDS_S)  # who speaks ends this one too
            os._exit(FAULTY)
        self._tell(finding)
        ranks = [seen.pid for seen in self._board.look() if not seen.is_over]
        if finding.fault == "hung":
            for pid in ranks:
                _send(pid, _SHOW_STACK)
            time.sleep(_STACKS_S)
        for pid in ranks:
            if pid != os.getpid():
                _send(pid, signal.SIGKILL)
        self._board.clear()
        os._exit(FAULTY)

    def tell_failure(self, error: Exception, whereabouts: Whereabouts) -> None:
        """Leave word of an error that ends this rank, for the other machines; here torchrun ends the others."""
        if self._may_speak():
            self._tell(Finding("failed", whereabouts.see(), f"{type(error).__name__}: {error}"))

    def _tell(self, finding: Finding) -> None:
        """Say what is wrong, and leave it for the other machines."""
        now, sightings = time.monotonic(), self._board.look()
        lines = [seen.describe(now) for seen in sightings]
        print(_message(finding, lines, now), file=sys.stderr, flush=True)
        about = finding.about
        content = {
            "fault": finding.fault,
            "detail": finding.detail,
            "host": platform.node(),
            "rank": about and about.rank,
            "stage": about and about.stage,
            "iteration": about and about.iteration,
            "phase": about and about.phase,
            "action": about and about.action and str(about.action),
            "microbatch": about and about.action and about.action.microbatch,
            "seconds": about and round(now - about.since, 1),
            "ranks": lines,
        }
        try:
            (self._folder / f"fault_{self._machine}.json").write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            print(f"this cannot be left in the run's folder: {error}", file=sys.stderr, flush=True)

    def notice_sleep(self) -> None:
        """Called before every look: time in which nobody looks on counts for no rank."""
        now = time.monotonic()
        if now - self._last_look > _ASLEEP_S:
            self._awake_since = now
        self._last_look = now

    def find(self) -> Finding | None:
        """What is wrong now, if anything is."""
        sightings, now = self._board.look(), time.monotonic()
        missed = [seen for seen in sightings if not seen.is_over]
        dead = [seen for seen in missed if _state(seen.pid) in _GONE]
        if dead:
            return Finding("died", min(dead, key=_is_waiting))
        late = [seen for seen in missed if 0 < self._hang_timeout < now - max(seen.since, self._awake_since)]
        if late:
            return Finding("hung", min(late, key=_suspicion))
        if os.environ.get("LOCAL_RANK", "0") == "0" and (elsewhere := self._fault_elsewhere()):
            return Finding("elsewhere", None, elsewhere.name)
        return None

    def _look_on(self) -> None:
        while not self._is_over.wait(POLL_S):
            self.notice_sleep()
            self.look()
            self._beat()

    def _fault_elsewhere(self) -> Path | None:
        own = f"fault_{self._machine}.json"
        return next((path for path in sorted(self._folder.glob("fault_*.json")) if path.name != own), None)

    def _may_speak(self) -> bool:
        """True for the first of this machine that asks."""
        try:
            (self._board.folder / "fault").open("x").close()
        except (FileExistsError, FileNotFoundError):  # the first is at it, or has cleared the board
            return False
        except OSError:  # no room: better twice than never
            return True
        return True


@contextmanager
def watch_over(
    attempt: Attempt,
    *,
    hang_timeout: float,
    rank: int,
    stage: int,
    barrier: Callable[[], None],
    beat: Callable[[Whereabouts], None],
) -> Iterator[tuple[Whereabouts, Watchdog]]:
    """Around training; gives this rank's record and its watchdog. Collective.

    Args:
        rank, stage: this one's.
        beat: what else the thread does at every look.

    Raises:
        FieldError: this machine's folder for temporary files cannot be written.
    """
    board = open_board()
    try:
        whereabouts = board.join(int(os.environ.get("LOCAL_RANK", "0")), rank=rank, stage=stage)
    except OSError as error:
        raise FieldError(
            "faults", f"{board.folder} cannot be written: {error.strerror}; TMPDIR names another place"
        ) from error
    barrier()
    watchdog = Watchdog(board, attempt.folder, hang_timeout=hang_timeout, beat=lambda: beat(whereabouts))
    watchdog.start()
    try:
        yield whereabouts, watchdog
    except UserError:  # all ranks raise it, or this one ends the job
        raise
    except Exception as error:
        watchdog.look_for_the_lost()
        watchdog.tell_failure(error, whereabouts)
        raise
    finally:
        whereabouts.leave()
        watchdog.stop()
        if all(seen.is_over for seen in board.look()):
            board.clear()


_GONE, _STOPPED = "ZX", "Tt"


def _state(pid: int) -> str:
    """Linux's letter for what a process does; X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X" if Path("/proc/self").exists() else "?"


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _is_waiting(seen: Sighting) -> bool:
    return seen.action is not None and seen.action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)


def _suspicion(seen: Sighting) -> tuple[bool, bool, float]:
    """The least is the likeliest culprit: a process that was stopped; not one that waits for another; the first."""
    return _state(seen.pid) not in _STOPPED, _is_waiting(seen), seen.since


def _message(finding: Finding, ranks: list[str], now: float) -> str:
    about = finding.about
    who = about.describe(now) if about is not None else finding.detail
    heads = {
        "died": f"fault: a rank has died: {who}",
        "hung": f"fault: a rank hangs: {who}",
        "failed": f"fault: a rank has failed: {who}: {finding.detail}",
        "elsewhere": f"fault: the job has a fault on another machine: {who}",
    }
    return "\n".join([heads[finding.fault], *(f"  {line}" for line in ranks)])
