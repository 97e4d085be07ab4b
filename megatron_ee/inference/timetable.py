"""Launches that are under way on the stages of a pipeline, by a clock that runs on estimated costs.

All that follow the same pipeline, in one process or several, see launches begin and end in the same order, however long
they really take: so they need not ask each other what happens next. Imports no torch.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

_TOGETHER = 0.1
"""Launches that end within this share of the cost of the one that ends first end with it: estimates are no better, and
a stage that began anew at once would miss what the others bring."""

Flight = TypeVar("Flight")


@dataclass(frozen=True, slots=True)
class _UnderWay(Generic[Flight]):
    flight: Flight
    cost: float
    end: float


class Timetable(Generic[Flight]):
    """One launch a stage at a time.

    Attributes:
        now: by its clock.
    """

    def __init__(self, num_stages: int) -> None:
        self.now = 0.0
        self._num_stages = num_stages
        self._under_way: dict[int, _UnderWay[Flight]] = {}

    @property
    def free(self) -> list[int]:
        """Stages with nothing to do."""
        return [stage for stage in range(self._num_stages) if stage not in self._under_way]

    @property
    def flights(self) -> list[Flight]:
        """The first stage's first."""
        return [of.flight for _, of in sorted(self._under_way.items())]

    def left(self, stage: int) -> float | None:
        """The time until something may come to a stage: from the one before, or, as tokens return, from anywhere to the
        first. None: nothing is under way there."""
        ends = [of.end for number, of in self._under_way.items() if stage == 0 or number == stage - 1]
        return min(ends) - self.now if ends else None

    def begin(self, stage: int, flight: Flight, cost: float) -> None:
        assert stage not in self._under_way, f"stage {stage} is busy"
        self._under_way[stage] = _UnderWay(flight, cost, self.now + cost)

    def end(self) -> list[Flight]:
        """Those that end next, the deepest first; the clock goes on to then."""
        if not self._under_way:
            return []
        first = min(self._under_way.values(), key=lambda of: of.end)
        ending = {stage for stage, of in self._under_way.items() if of.end <= first.end + _TOGETHER * first.cost}
        self.now = max(self._under_way[stage].end for stage in ending)
        return [self._under_way.pop(stage).flight for stage in sorted(ending, reverse=True)]
