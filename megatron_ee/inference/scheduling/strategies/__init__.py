"""Which queue runs next: the one thing in which batching with exits may differ, and no token with it."""

from collections.abc import Sequence
from typing import Protocol

from megatron_ee.inference.scheduling.fronts import Front


class Strategy(Protocol):
    """
    Attributes:
        carries: rows that have left at an exit run on with those that have not.
    """

    carries: bool

    def choose(self, fronts: Sequence[Front], launch: int) -> Sequence[Front]:
        """Those that run next if there is room, the most pressing first: one or more, all of one depth.

        Args:
            fronts: of all sequences that go on; one at least.
            launch: its number.
        """
        ...
