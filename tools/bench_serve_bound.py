"""What no strategy can do better, for the very depths that tokens had and prompts that came before them.

    sum over segments of P_k r_k + n_k c_k(N_k / n_k),    n_k = T_k / launch rows

T_k tokens go through segment k, each launch takes as many of them as fill it, and N_k rows have to run there: theirs,
and, where that is made up for, those of earlier tokens of the same text that left before. c_k is the lower convex hull
of what so many rows cost, so that no way to deal them out to launches costs less. P_k rows of prompts cost what a row
costs in the best launch of all. It needs more sequences than there are, now and then, and knows no bookkeeping.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from megatron_ee.config import KvPolicy
from megatron_ee.inference.scheduling.costs import Curve, Segment, SegmentCosts, cost_of
from megatron_ee.inference.scheduling.simulate import SimulatedRequest


def least_seconds(
    load: Sequence[SimulatedRequest],
    costs: SegmentCosts,
    rates: Mapping[Segment, float],
    *,
    launch_rows: int,
    kv_policy: KvPolicy,
) -> float:
    """
    Args:
        costs: of launches without prompts.
        rates: r_k, see `prompt_rates`.
    """
    depths = (0, *(stop for _, stop in sorted(costs.segments)))
    seconds = _storing(load, costs, depths, launch_rows) if kv_policy == "propagate" else 0.0
    for segment in pairwise(depths):
        tokens = sum(depth > segment[0] for of in load for depth in of.depths[1:])
        first = sum(of.depths[0] > segment[0] for of in load)
        rows = [rows_of(of, segment, propagates=kv_policy == "propagate") for of in load]
        seconds += sum(of_prompt for of_prompt, _ in rows) * rates[segment]
        if tokens:
            launches = tokens / launch_rows
            hull = lower_hull(costs.segments[segment])
            seconds += launches * cost_of(hull, sum(of_tokens for _, of_tokens in rows) / launches)
            seconds += launches * costs.of_head(segment[1], (tokens + first) / launches)
    return seconds


def prompt_rates(costs: SegmentCosts) -> dict[Segment, float]:
    """Of a row in the launch where it costs least, by segment."""
    return {segment: min(cost / rows for rows, cost in curve) for segment, curve in costs.segments.items()}


def rows_of(request: SimulatedRequest, segment: Segment, *, propagates: bool) -> tuple[int, int]:
    """Positions of a prompt, and of the tokens after it, that have to run a segment: with an exact policy all up to the
    last token that goes through it, else those of such tokens alone, and a prompt's but for its last one."""
    through = [number for number, depth in enumerate(request.depths) if depth > segment[0]]
    if propagates:
        first = through[:1] == [0]
        return request.prompt - 1 + first, len(through) - first
    return (request.prompt, through[-1]) if through else (0, 0)


def lower_hull(curve: Curve) -> Curve:
    """The convex curve that no point is below, through as many of them as may be."""
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        while len(hull) > 1:
            (left, low), (middle, between) = hull[-2:]
            if (between - low) * (x - left) < (y - low) * (middle - left):
                break
            hull.pop()
        hull.append((x, y))
    return tuple(hull)


def _storing(load: Sequence[SimulatedRequest], costs: SegmentCosts, depths: Sequence[int], launch_rows: int) -> float:
    """Keys and values above each exit, for all but the last token of a text."""
    leaving: Mapping[int, int] = Counter(depth for of in load for depth in of.depths[:-1] if depth < depths[-1])
    return sum(count / launch_rows * costs.of_store(depth, depths[-1], launch_rows) for depth, count in leaving.items())
