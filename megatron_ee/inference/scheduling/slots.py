"""How full launches are: counted as they are planned, by the engine's benches and by its simulator."""

from collections.abc import Mapping
from dataclasses import dataclass

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
    """

    launches: int = 0
    real: int = 0
    filled: int = 0
    taken: int = 0
    empty: int = 0

    @property
    def rows_a_launch(self) -> float:
        return (self.real + self.filled) / self.launches if self.launches else 0.0

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of slots: of tokens on their way, filled, empty. They add up to 1."""
        slots = self.taken + self.filled + self.empty
        return (self.taken / slots, self.filled / slots, self.empty / slots) if slots else (0.0, 0.0, 0.0)


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
        before = self._use.get((plan.start, plan.stop), SlotUse())
        self._use[plan.start, plan.stop] = SlotUse(
            before.launches + 1,
            before.real + sum(plan.counts.values()),
            before.filled + filled,
            before.taken + taken,
            before.empty + max(0, self._launch_rows - taken - filled),
        )

    @property
    def use(self) -> Mapping[Segment, SlotUse]:
        """By segment, the first layers first."""
        return dict(sorted(self._use.items()))
