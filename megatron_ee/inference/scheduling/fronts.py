"""Where sequences are, and what is launched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Front(NamedTuple):
    """The rows of a sequence that have to run before it says its next token.

    Attributes:
        slot: of the sequence.
        at: layers that they have run: 0, or those before an exit at which they wait.
        rows: how many they are; with those of earlier tokens that wait there too, if it goes deeper.
        stop: where they are looked at next, or the number of layers.
        since: the number of the launch that brought them there.
        drafts: it drafts there, and more of its draft follows.
        owes: layers that its tokens skip are made up for later.
        verifies: what it has drafted comes there, or waits there, to be verified.
    """

    slot: int
    at: int
    rows: int
    stop: int
    since: int
    drafts: bool = False
    owes: bool = True
    verifies: bool = False


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Rows that run layers `start + 1` to `stop` together.

    Attributes:
        counts: of each sequence that is on its way, by slot: how many of its rows.
        fills: positions of other sequences that run along because there is room: slot -> how many.
    """

    start: int
    stop: int
    counts: Mapping[int, int]
    fills: Mapping[int, int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values()) + sum(self.fills.values())


def by_depth(fronts: Sequence[Front]) -> dict[int, list[Front]]:
    """Queues, the shallowest first, each with those first that have waited longest."""
    queues: dict[int, list[Front]] = {}
    for front in sorted(fronts, key=lambda front: (front.at, front.since, front.slot)):
        queues.setdefault(front.at, []).append(front)
    return queues
