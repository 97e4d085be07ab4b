"""Launches that are under way on the stages of a pipeline, by a clock that runs on estimated costs.

All that follow the same pipeline, in one process or several, see launches begin and end in the same order, however long
they really take: so they need not ask each other what happens next. Imports no torch.
"""

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

_TOGETHER = 0.1
"""Launches that end within this share of the cost of the one that ends first end with it: estimates are no better, and
a stage that began anew at once would miss what the others bring."""

Flight = TypeVar("Flight")


class Coming(NamedTuple):
    """What may come to a stage next.

    Attributes:
        left: the time until then.
        tokens: at most.
    """

    left: float
    tokens: int


@dataclass(frozen=True, slots=True)
class _UnderWay(Generic[Flight]):
    flight: Flight
    cost: float
    tokens: int
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

    def coming(self, stage: int) -> Coming | None:
        """From the stage before, or, as tokens return, from anywhere to the first. None: nothing is under way there."""
        coming = [of for number, of in self._under_way.items() if stage == 0 or number == stage - 1]
        if not coming:
            return None
        first = min(of.end for of in coming)
        return Coming(first - self.now, sum(of.tokens for of in coming if of.end == first))

    def begin(self, stage: int, flight: Flight, cost: float, tokens: int) -> None:
        """
        Args:
            tokens: on their way in it.
        """
        assert stage not in self._under_way, f"stage {stage} is busy"
        self._under_way[stage] = _UnderWay(flight, cost, tokens, self.now + cost)

    def end(self) -> list[Flight]:
        """Those that end next, the deepest first; the clock goes on to then."""
        if not self._under_way:
            return []
        first = min(self._under_way.values(), key=lambda of: of.end)
        ending = {stage for stage, of in self._under_way.items() if of.end <= first.end + _TOGETHER * first.cost}
        self.now = max(self._under_way[stage].end for stage in ending)
        return [self._under_way.pop(stage).flight for stage in sorted(ending, reverse=True)]
