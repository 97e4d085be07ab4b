"""When a start of a run ends before the run does: somebody wants the machine back, or its time is up.

A signal only leaves word. All ranks ask for it together between two steps, so that they stop at the same one, with a
checkpoint of it. Imports no torch: handlers have to be there before its import, which takes seconds.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""What SLURM's --signal is usually told to send, SLURM's and torchrun's end, and Ctrl-C. Of several the last counts:
scripts/train.sh follows up every signal with SIGUSR1."""

REASONS = ("", "exit_duration", *(number.name for number in SIGNALS))
"""What a stop is called, by the number that ranks agree on."""


def end_with(parent: int) -> None:
    """End this process when its parent goes, however it went: a torchrun that was killed leaves no ranks behind that
    would write into the run beside those of the next start. Linux only.

    Args:
        parent: the process that it is to be; one that has gone already ends this one at once.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class StopRequests:
    """What this process has been told. Time counts from here.

    Args:
        exit_duration: minutes, or None; see the config.
    """

    def __init__(self, exit_duration: float | None = None) -> None:
        self._started, self._reason = time.monotonic(), 0
        self.exit_duration = exit_duration
        self.last_words: Callable[[], None] = lambda: None

    def listen(self) -> None:
        """Take SIGNALS from here on. A second Ctrl-C ends the process as it always does."""
        for number in SIGNALS:
            signal.signal(number, self._take)

    @staticmethod
    def ignore() -> None:
        """Once there is nothing left to stop: while Python ends, a signal that it has a handler for would kill it."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def end_with_siblings(self) -> None:
        """From here on, a SIGTERM that comes because another rank of this node is gone ends this one, after its
        `last_words`: torchrun sends it, and the step can never be finished. That is looked for in a thread, because a
        handler has to wait for the main one, which may be waiting for the lost rank. Linux only."""
        if not Path("/proc/self").exists():
            return
        number_of_ranks, torchrun = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.getppid()
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

        def watch() -> None:
            while numbers := os.read(told, 64):
                if signal.SIGTERM in numbers and _living_children(torchrun) < number_of_ranks:
                    self.last_words()
                    os._exit(128 + signal.SIGTERM)

        threading.Thread(target=watch, name="siblings", daemon=True).start()

    def reason(self) -> int:
        """The place in REASONS of what this process knows; 0 for none."""
        if self._reason:
            return self._reason
        if self.exit_duration is None:
            return 0
        return int(time.monotonic() - self._started >= 60 * self.exit_duration)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._reason = max(self._reason, REASONS.index(signal.Signals(number).name))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _living_children(parent: int) -> int:
    """How many children a process has that have not ended."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    states = [path.read_text().rpartition(")")[2].split()[0] for pid in children if (path := _stat(pid)).exists()]
    return sum(state not in "ZX" for state in states)


def _stat(pid: str) -> Path:
    return Path(f"/proc/{pid}/stat")
