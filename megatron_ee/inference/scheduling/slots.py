"""How full launches are: counted as they are planned, by the engine's benches and by its simulator."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_ee.inference.scheduling.costs import Segment
from megatron_ee.inference.scheduling.fronts import LaunchPlan


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Of one segment, over a whole run. A launch has a slot for each of the tokens that fill it; rows of earlier tokens
    that a token takes along need none, and a prompt's rows have one together.

    Attributes:
        launches: how many.
        real: rows of tokens on their way, with those that they take along.
        filled: rows that ran along because there was room.
        taken: slots of these tokens.
        empty: slots that neither they nor filled rows took.
        catch_ups: launches beside these, since too many positions waited.
        caught_up: their rows.
    """

    launches: int = 0
    real: int = 0
    filled: int = 0
    taken: int = 0
    empty: int = 0
    catch_ups: int = 0
    caught_up: int = 0

    @property
    def rows_a_launch(self) -> float:
        return (self.real + self.filled) / self.launches if self.launches else 0.0

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of slots: of tokens on their way, filled, empty. They add up to 1."""
        slots = self.taken + self.filled + self.empty
        return (self.taken / slots, self.filled / slots, self.empty / slots) if slots else (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class StageUse:
    """What a stage of a pipeline did, in shares of the time.

    Attributes:
        real: it ran tokens on their way, whatever ran along.
        filled: it ran nothing but rows that had time.
    """

    real: float = 0.0
    filled: float = 0.0

    @property
    def idle(self) -> float:
        return max(0.0, 1 - self.real - self.filled)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Real, filled, idle."""
        return self.real, self.filled, self.idle


class SlotCounter:
    """
    Args:
        launch_rows: slots of a launch.
    """

    def __init__(self, launch_rows: int) -> None:
        self._launch_rows = launch_rows
        self._use: dict[Segment, SlotUse] = {}

    def count(self, plan: LaunchPlan) -> None:
        taken, filled = len(plan.counts), sum(plan.fills.values())
        before = self._of(plan.start, plan.stop)
        self._use[plan.start, plan.stop] = replace(
            before,
            launches=before.launches + 1,
            real=before.real + sum(plan.counts.values()),
            filled=before.filled + filled,
            taken=before.taken + taken,
            empty=before.empty + max(0, self._launch_rows - taken - filled),
        )

    def catch_up(self, start: int, stop: int, rows: int) -> None:
        """A launch of positions that have waited, and of nothing else."""
        before = self._of(start, stop)
        self._use[start, stop] = replace(before, catch_ups=before.catch_ups + 1, caught_up=before.caught_up + rows)

    @property
    def use(self) -> Mapping[Segment, SlotUse]:
        """By segment, the first layers first."""
        return dict(sorted(self._use.items()))

    def _of(self, start: int, stop: int) -> SlotUse:
        return self._use.get((start, stop), SlotUse())
