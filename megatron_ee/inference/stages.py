"""Which layers run where: the stages of a pipeline, of which this process holds one, or all. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stages:
    """
    Attributes:
        stops: the layer that each stage ends with, ascending; the last one is the model's.
        own: the stage that this process holds; None: all of them.
    """

    stops: tuple[int, ...]
    own: int | None = None

    @property
    def count(self) -> int:
        return len(self.stops)

    @property
    def borders(self) -> tuple[int, ...]:
        """Layers between two stages."""
        return self.stops[:-1]

    def start(self, stage: int) -> int:
        """Layers before a stage."""
        return self.stops[stage - 1] if stage else 0

    def of(self, depth: int) -> int:
        """The stage of the layer that comes after so many."""
        return next(stage for stage, stop in enumerate(self.stops) if depth < stop)

    def end(self, depth: int) -> int:
        """The last layer of that stage."""
        return self.stops[self.of(depth)]

    def holds(self, depth: int) -> bool:
        """Whether the layer that comes after so many is here."""
        return self.own is None or self.of(depth) == self.own

    def held(self, start: int, stop: int) -> tuple[int, int]:
        """Of layers `start + 1` to `stop`, those that are here, likewise; an empty range where none is."""
        if self.own is None:
            return start, stop
        first = max(start, self.start(self.own))
        return first, max(first, min(stop, self.stops[self.own]))


def depths_of(exits: Sequence[int], stages: Stages) -> tuple[int, ...]:
    """Where rows may wait or end, in layers run."""
    return tuple(sorted({0, *exits, *stages.stops}))
