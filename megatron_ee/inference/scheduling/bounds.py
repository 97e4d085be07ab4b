"""What no strategy can do better, in closed form: results are held against it.

q_k is the share of tokens that go through segment k, c_k(n) what n rows cost there with their heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from megatron_ee.config import KvPolicy
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.stages import Stages


def reach_of(depths: Sequence[int], exits: Sequence[int], num_layers: int) -> Mapping[tuple[int, int], float]:
    """Segment -> q_k.

    Args:
        depths: of tokens; one at least.
    """
    borders = (0, *exits, num_layers)
    return {(start, stop): sum(depth > start for depth in depths) / len(depths) for start, stop in pairwise(borders)}


def most_tokens_per_second(
    reach: Mapping[tuple[int, int], float],
    costs: SegmentCosts,
    *,
    launch_rows: int,
    kv_policy: KvPolicy,
    prompt_rows: float = 0.0,
) -> float:
    """Of launches that are always full: L / sum_k q_k c_k(n_k), with L launch rows. Exact policies make up for skipped
    layers in the launches of those that go deeper: n_k = L / q_k; propagating makes their keys and values alone: n_k =
    L. Prompts run in the same launches. Where rows cost nothing this is X0 / D, full depth's throughput over the mean
    depth share D = sum q_k a_k / sum a_k. What a text owes at its end, which is never made up for, is counted.

    Args:
        prompt_rows: of prompts, for each new token, without the last one of each prompt.
    """
    cost = launch_rows * costs.token
    for (start, stop), share in reach.items():
        if share:
            rows = launch_rows * (prompt_rows / share + (1 if kv_policy == "propagate" else 1 / share))
            cost += share * (costs.of(start, stop, rows) + costs.of_head(stop, launch_rows) + costs.step)
        if kv_policy == "propagate":
            cost += (1 - share) * costs.of_store(start, stop, launch_rows)
    return launch_rows / cost if cost else 0.0


def most_tokens_per_second_of_stages(
    reach: Mapping[tuple[int, int], float],
    costs: SegmentCosts,
    stages: Stages,
    *,
    residents: int,
    launch_rows: int,
    kv_policy: KvPolicy,
    prompt_rows: float = 0.0,
) -> float:
    """Of a pipeline: what its slowest stage could do, if its launches were always full; or all sequences, if each of
    their tokens were alone and nothing ever waited. Every process plans the launches of all stages; here each pays for
    its own alone.

    Args:
        reach, costs: of segments that end where stages do, too.
    """
    alone = sum(
        share * (costs.of(*segment, 1) + costs.of_head(segment[1], 1) + costs.step) for segment, share in reach.items()
    )
    bounds = [residents / alone] if alone else []
    for stage, stop in enumerate(stages.stops):
        own = {of: share for of, share in reach.items() if stages.start(stage) <= of[0] < stop}
        bound = most_tokens_per_second(
            own, replace(costs, token=0.0), launch_rows=launch_rows, kv_policy=kv_policy, prompt_rows=prompt_rows
        )
        if bound:
            bounds.append(bound)
    return min(bounds, default=0.0)


def gain_of_rebatching(deeper: float, first: float, second: float) -> float:
    """Over lockstep, with one exit, no more sequences than launch rows, and rows that cost nothing: the best over t of
    [(1 - (1-q)^t) / q] (a1 + a2) / (t a1 + a2), where t shallow launches come before a deep one.

    Args:
        deeper: q, the share of tokens that go through the second segment.
        first, second: a1 and a2, the costs of a launch of each.
    """
    if deeper == 0:
        return (first + second) / first
    return max(
        (1 - (1 - deeper) ** times) / deeper * (first + second) / (times * first + second) for times in range(1, 200)
    )
