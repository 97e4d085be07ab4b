"""What launches cost, from recorded ones, and what comes on top of them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from bench_serve_record import Part, Served, Step

from megatron_ee.inference.scheduling.costs import Curve, Segment, SegmentCosts

_BINS_AN_OCTAVE = 2
_EACH_ALONE = 4
"""Up to so many rows, each number has a point of its own."""


def recorded_costs(served: Iterable[Served], depths: Sequence[int], *, prompts: bool = True) -> SegmentCosts:
    """Of layers, heads, and keys and values alone, by their rows.

    Args:
        depths: 0, exits, and the number of layers.
        prompts: launches with rows of prompts count too.
    """
    layers: dict[Segment, list[tuple[int, float]]] = defaultdict(list)
    stores: dict[Segment, list[tuple[int, float]]] = defaultdict(list)
    heads: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for part in _whole(part for of in served for step in of.steps for part in step.parts):
        if part.prompts and not prompts:
            continue
        if part.kind == "head":
            heads[part.stop].append((part.rows, part.seconds))
            continue
        for start, stop in pairwise(depths):
            if part.start <= start and stop <= part.stop:  # its share of a launch through several
                share = part.seconds * (stop - start) / (part.stop - part.start)
                (layers if part.kind == "layers" else stores)[start, stop].append((part.rows, share))
    return SegmentCosts(
        {segment: curve_of(points) for segment, points in layers.items()},
        {layer: curve_of(points) for layer, points in heads.items()},
        {segment: curve_of(points) for segment, points in stores.items()},
    )


def with_overhead(costs: SegmentCosts, served: Served) -> SegmentCosts:
    """With what this run spent beside its launches: a + b tokens a step, by least squares, so that it adds up."""
    step, token = line_of([(of.said, beside(of)) for of in served.steps])
    return replace(costs, step=step, token=token)


def beside(step: Step) -> float:
    """Seconds of planning, choosing tokens and bookkeeping."""
    return step.seconds - sum(part.seconds for part in step.parts)


def line_of(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a and b of y = a + b x, neither below 0, with the mean of all y."""
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
    slope = min(max(slope, 0.0), y_mean / x_mean if x_mean else 0.0)
    return y_mean - slope * x_mean, slope


def curve_of(points: Sequence[tuple[int, float]]) -> Curve:
    """Means over similar numbers of rows; more rows never cost less: where they do by chance, both have their mean."""
    bins: dict[float, list[tuple[int, float]]] = defaultdict(list)
    for rows, seconds in points:
        bins[rows if rows <= _EACH_ALONE else round(_BINS_AN_OCTAVE * math.log2(rows)) + _EACH_ALONE].append(
            (rows, seconds)
        )
    pools: list[tuple[int, float, float]] = []  # how many, their rows, their seconds
    for _, of in sorted(bins.items()):
        pools.append((len(of), float(sum(rows for rows, _ in of)), sum(seconds for _, seconds in of)))
        while len(pools) > 1 and pools[-2][2] / pools[-2][0] > pools[-1][2] / pools[-1][0]:
            last = pools.pop()
            pools[-1] = (pools[-1][0] + last[0], pools[-1][1] + last[1], pools[-1][2] + last[2])
    return tuple((rows / count, seconds / count) for count, rows, seconds in pools)


def _whole(parts: Iterable[Part]) -> Iterable[Part]:
    """A head's features, which have no rows of their own, with the projection after them."""
    before = 0.0
    for part in parts:
        if part.kind == "head" and part.rows == 0:
            before += part.seconds
        elif part.kind == "head":
            yield part._replace(seconds=part.seconds + before)
            before = 0.0
        else:
            yield part
