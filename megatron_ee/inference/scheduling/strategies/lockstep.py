"""The whole batch goes on together until its last row has left: what decoding without a scheduler of exits does."""

from collections.abc import Sequence

from megatron_ee.inference.scheduling.fronts import Front
from megatron_ee.inference.scheduling.strategies.compaction import those_on_their_way


class Lockstep:
    """
    Args:
        entry: layers that those have run that begin here.
    """

    carries = True

    def __init__(self, entry: int = 0) -> None:
        self._entry = entry

    def choose(self, fronts: Sequence[Front], launch: int) -> Sequence[Front]:
        return those_on_their_way(fronts, self._entry)
