"""Times of what a device does, without waiting for it: marks are set now, and read when they have passed."""

import time
from collections.abc import Iterable
from typing import Protocol, TypeVar

import torch

Mark = TypeVar("Mark")


class Clock(Protocol[Mark]):
    """Sets marks in a device's work, in order."""

    def mark(self) -> Mark:
        """Set a mark after all work handed over so far."""
        ...

    def has_passed(self, mark: Mark) -> bool:
        """Whether the device got there."""
        ...

    def wait(self, mark: Mark) -> None:
        """Wait until it has."""
        ...

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time from a mark to a later one; both have passed."""
        ...

    def release(self, marks: Iterable[Mark]) -> None:
        """These have been read and may be used again."""
        ...


class HostClock:
    """Where work is done when its call returns: this process's monotonic clock, in seconds."""

    mark = staticmethod(time.perf_counter)

    def has_passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None: ...

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def release(self, marks: Iterable[float]) -> None: ...


class CudaClock:
    """CUDA events on the current stream, to half a microsecond. As many exist as were ever unread at once."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()  # type: ignore[no-untyped-call]

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000

    def release(self, marks: Iterable[torch.cuda.Event]) -> None:
        self._free.extend(marks)
