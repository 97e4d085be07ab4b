"""What launches cost, measured or estimated: seconds, or any other unit, by segment and number of rows."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

Segment = tuple[int, int]
"""Layers `start + 1` to `stop`."""
Curve = tuple[tuple[float, float], ...]
"""(rows, cost), by ascending rows."""


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
    """

    segments: Mapping[Segment, Curve]
    heads: Mapping[int, Curve] = field(default_factory=dict)

    def of(self, start: int, stop: int, rows: float) -> float:
        """Of a launch through several segments."""
        inside = (curve for (first, last), curve in self.segments.items() if start <= first and last <= stop)
        return sum(cost_of(curve, rows) for curve in inside)

    def of_head(self, layer: int, rows: float) -> float:
        return cost_of(self.heads[layer], rows) if layer in self.heads else 0.0
