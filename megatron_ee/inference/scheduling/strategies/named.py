"""Strategies by the names that `inference.scheduling.strategy` may have."""

from collections.abc import Sequence

from megatron_ee.config import SchedulingParams
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.strategies import Strategy
from megatron_ee.inference.scheduling.strategies.compaction import Compaction
from megatron_ee.inference.scheduling.strategies.lockstep import Lockstep
from megatron_ee.inference.scheduling.strategies.rebatch import Rebatch


def make_planner(
    params: SchedulingParams, costs: SegmentCosts, depths: Sequence[int], *, residents: int, prefill_chunk: int
) -> Planner:
    """
    Args:
        costs: of launches, which the strategy weighs.
        depths: where rows may wait or end: 0, exits, the number of layers.
        residents: sequences at most.
    """
    launch_rows = residents if params.launch_rows is None else params.launch_rows
    strategy: Strategy
    match params.strategy:
        case "lockstep":
            strategy = Lockstep()
        case "compaction":
            strategy = Compaction()
        case "rebatch":
            strategy = Rebatch(costs, depths, launch_rows=launch_rows, max_wait=params.max_wait)
    return Planner(strategy, launch_rows=launch_rows, prefill_chunk=prefill_chunk)
