"""What launches cost, measured or estimated: seconds, or any other unit, by segment and number of rows."""

import json
import math
import os
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_ee.errors import FieldError

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

    def cut_at(self, borders: Collection[int]) -> "SegmentCosts":
        """With segments that end there too, where stages do: the layers of one cost the same."""
        return replace(self, segments=_cut(self.segments, borders), stores=_cut(self.stores, borders))


def estimated_costs(
    layers: Sequence[float],
    exits: Sequence[int],
    row: float,
    *,
    calls: float = 0.0,
    heads: Mapping[int, float] | None = None,
) -> SegmentCosts:
    """From what a launch reads, in its unit.

    Args:
        layers: of each layer, the first one first.
        row: what each more row adds, as a share of what is read.
        calls: of each layer, whatever is in it.
        heads: exit, or the number of layers -> what its head reads.
    """
    borders = (0, *exits, len(layers))
    segments = {
        (start, stop): _line(read := sum(layers[start:stop]), (stop - start) * calls, read * row)
        for start, stop in pairwise(borders)
    }
    return SegmentCosts(segments, {layer: _line(read, 0.0, read * row) for layer, read in (heads or {}).items()})


def write_costs(path: Path, costs: SegmentCosts) -> None:
    """Of costs in seconds, as JSON, so that the file is whole or absent."""
    content = {
        "unit": "seconds",
        "segments": [[start, stop, curve] for (start, stop), curve in sorted(costs.segments.items())],
        "heads": [[layer, curve] for layer, curve in sorted(costs.heads.items())],
        "stores": [[start, stop, curve] for (start, stop), curve in sorted(costs.stores.items())],
        "step": costs.step,
        "token": costs.token,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    aside.replace(path)


def read_costs(path: Path) -> SegmentCosts:
    """What `write_costs` wrote; stores, step and token may be left out.

    Raises:
        FieldError: the file or a field of it is wrong, which is named: no JSON, another unit, rows that don't ascend,
            costs below 0, segments that don't begin where the one before ends, a head where none of them ends, a store
            of no segment.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FieldError(str(path), f"cannot be read as JSON: {error}") from error
    fields = content if isinstance(content, dict) else {}
    if fields.get("unit") != "seconds":
        raise FieldError(f"{path}: unit", f"{fields.get('unit')!r}, not 'seconds'")
    segments = _segments(fields, path)
    heads: dict[int, Curve] = {}
    for where, (layer, curve) in _entries(fields, "heads", 2, path):
        if not _is_whole(layer) or layer in heads or layer not in {last for _, last in segments}:
            raise FieldError(where, f"no segment ends after layer {layer!r}, or its head is there already")
        heads[layer] = _curve(curve, where)
    stores: dict[Segment, Curve] = {}
    for where, (start, stop, curve) in _entries({"stores": [], **fields}, "stores", 3, path):
        if not _is_whole(start) or not _is_whole(stop) or (start, stop) not in segments or (start, stop) in stores:
            raise FieldError(where, f"{start!r} to {stop!r} is no segment, or its store is there already")
        stores[start, stop] = _curve(curve, where)
    step, token = (_cost(fields.get(name, 0.0), name, path) for name in ("step", "token"))
    return SegmentCosts(segments, heads, stores, step, token)


def _segments(fields: Mapping[str, Any], path: Path) -> dict[Segment, Curve]:
    segments: dict[Segment, Curve] = {}
    stop = 0
    for where, (first, last, curve) in _entries(fields, "segments", 3, path):
        if not _is_whole(first) or not _is_whole(last) or first != stop or last <= first:
            raise FieldError(where, f"{first!r} to {last!r} is no segment that begins after layer {stop}")
        segments[first, last], stop = _curve(curve, where), last
    if not segments:
        raise FieldError(f"{path}: segments", "there is none")
    return segments


def _cost(value: Any, name: str, path: Path) -> float:
    if not _is_number(value) or value < 0:
        raise FieldError(f"{path}: {name}", f"{value!r} is no cost of 0 or more")
    return float(value)


def _entries(fields: Mapping[str, Any], name: str, size: int, path: Path) -> Iterable[tuple[str, list[Any]]]:
    """Each with what messages call it."""
    entries = fields.get(name)
    if not isinstance(entries, list):
        raise FieldError(f"{path}: {name}", "is no list")
    for number, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) != size:
            raise FieldError(f"{path}: {name}[{number}]", f"is no list of {size}")
        yield f"{path}: {name}[{number}]", entry


def _curve(points: Any, where: str) -> Curve:
    if not isinstance(points, list) or not points:
        raise FieldError(where, "has no list of [rows, cost]")
    before = 0.0
    for point in points:
        if not isinstance(point, list) or len(point) != 2 or not all(map(_is_number, point)):
            raise FieldError(where, f"{point!r} is no [rows, cost]")
        if point[0] <= before:
            raise FieldError(where, f"{point[0]:g} rows come after {before:g}: rows ascend, from above 0")
        if point[1] < 0:
            raise FieldError(where, f"a cost of {point[1]:g} is below 0")
        before = point[0]
    return tuple((rows, cost) for rows, cost in points)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _within(curves: Mapping[Segment, Curve], start: int, stop: int, rows: float) -> float:
    return sum(cost_of(curve, rows) for (first, last), curve in curves.items() if start <= first and last <= stop)


def _cut(curves: Mapping[Segment, Curve], borders: Collection[int]) -> Mapping[Segment, Curve]:
    return {
        (first, last): tuple((rows, cost * (last - first) / (stop - start)) for rows, cost in curve)
        for (start, stop), curve in curves.items()
        for first, last in pairwise([start, *sorted(border for border in set(borders) if start < border < stop), stop])
    }


def _line(read: float, calls: float, row: float) -> Curve:
    return ((1, read + calls), (2, read + calls + row))
