"""Rows that have left make the batch smaller; the next tokens begin when all of it has left."""

from collections.abc import Sequence

from megatron_ee.inference.scheduling.fronts import Front, by_depth


class Compaction:
    """
    Args:
        entry: layers that those have run that begin here.
    """

    carries = False

    def __init__(self, entry: int = 0) -> None:
        self._entry = entry

    def choose(self, fronts: Sequence[Front], launch: int) -> Sequence[Front]:
        return those_on_their_way(fronts, self._entry)


def those_on_their_way(fronts: Sequence[Front], entry: int) -> Sequence[Front]:
    """The shallowest of those that have begun, so that they join the deeper ones; or, if none has, all. Drafts come
    before, and so do their last tokens if all the others have to be verified, so that this is done together."""
    fronts = [front for front in fronts if front.drafts] or fronts
    queues = by_depth(fronts)
    begun = [depth for depth in queues if depth > entry]
    if all(front.verifies for depth in begun for front in queues[depth]):
        begun = [] if any(front.verifies for front in queues.get(entry, ())) else begun
    return queues[min(begun, default=entry)]
