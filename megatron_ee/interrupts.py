"""Moments in which a Ctrl-C has to wait."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Start threads or processes in here: an interrupt (SIGINT) comes when all of them are known, and is raised then.

    Processes that are started in here are never interrupted themselves, not even while they import: they inherit what
    is blocked. Their parent ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread is ever interrupted
        return
    interrupted = False

    def defer(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    handler = signal.signal(signal.SIGINT, defer)  # another thread, which blocks nothing, may be given the signal
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # a signal that waited reaches `defer` in here
        signal.signal(signal.SIGINT, handler)
        if interrupted:
            signal.raise_signal(signal.SIGINT)
