"""What launches cost, measured or estimated: seconds, or any other unit, by segment and number of rows."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Segment = tuple[int, int]
"""Layers `start + 1` to `stop`."""
Curve = tuple[tuple[float, float], ...]
"""(rows, cost), by ascending rows."""


ROW_SHARES = {"cpu": 0.08, "cuda": 0.0}
"""What each more row adds to a launch, as a share of what its first one reads, by the kind of device."""


def cost_of(curve: Curve, rows: float) -> float:
    """Between measured numbers of rows and beyond them, on a straight line; no rows cost nothing."""
    if rows <= 0:
        return 0.0
    if len(curve) == 1:
        return curve[0][1] * rows / curve[0][0]
    place = min(max(bisect_left(curve, rows, key=lambda point: point[0]), 1), len(curve) - 1)
    (few, low), (many, high) = curve[place - 1], curve[place]
    return low + (high - low) * (rows - few) / (many - few)


@dataclass(frozen=True, slots=True)
class SegmentCosts:
    """
    Attributes:
        segments: of rows through the layers between neighbouring exits.
        heads: exit, or the number of layers -> of its head, by the rows that are looked at.
        stores: of keys and values that are made without running a segment's layers, by their rows.
        step: of a launch, whatever is in it: planning and bookkeeping.
        token: of each token that is said, beyond its head.
    """

    segments: Mapping[Segment, Curve]
    heads: Mapping[int, Curve] = field(default_factory=dict)
    stores: Mapping[Segment, Curve] = field(default_factory=dict)
    step: float = 0.0
    token: float = 0.0

    def of(self, start: int, stop: int, rows: float) -> float:
        """Of a launch through several segments."""
        return _within(self.segments, start, stop, rows)

    def of_store(self, start: int, stop: int, rows: float) -> float:
        """Of keys and values alone, of several segments."""
        return _within(self.stores, start, stop, rows)

    def of_head(self, layer: int, rows: float) -> float:
        return cost_of(self.heads[layer], rows) if layer in self.heads else 0.0


def estimated_costs(layers: Sequence[float], exits: Sequence[int], row: float) -> SegmentCosts:
    """From what a launch reads, in its unit.

    Args:
        layers: of each layer, the first one first.
        row: what each more row adds, as a share of the first one.
    """
    borders = (0, *exits, len(layers))
    return SegmentCosts({(start, stop): _line(sum(layers[start:stop]), row) for start, stop in pairwise(borders)})


def _within(curves: Mapping[Segment, Curve], start: int, stop: int, rows: float) -> float:
    return sum(cost_of(curve, rows) for (first, last), curve in curves.items() if start <= first and last <= stop)


def _line(first: float, row: float) -> Curve:
    return ((1, first), (2, first * (1 + row)))
