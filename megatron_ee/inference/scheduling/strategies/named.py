"""Strategies by the names that `inference.scheduling.strategy` may have."""

from collections.abc import Sequence

from megatron_ee.config import SchedulingParams
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.scheduling.strategies import Strategy
from megatron_ee.inference.scheduling.strategies.compaction import Compaction
from megatron_ee.inference.scheduling.strategies.lockstep import Lockstep
from megatron_ee.inference.scheduling.strategies.rebatch import Rebatch
from megatron_ee.inference.stages import Stages


def make_planner(
    params: SchedulingParams, costs: SegmentCosts, depths: Sequence[int], *, residents: int, prefill_chunk: int
) -> Planner:
    """
    Args:
        costs: of launches, which the strategy weighs.
        depths: where rows may wait or end: 0, exits, the number of layers; or those of a stage of the model.
        residents: sequences at most.
    """
    launch_rows = residents if params.launch_rows is None else params.launch_rows
    strategy: Strategy
    match params.strategy:
        case "lockstep":
            strategy = Lockstep(depths[0])
        case "compaction":
            strategy = Compaction(depths[0])
        case "rebatch":
            strategy = Rebatch(costs, depths, launch_rows=launch_rows, max_wait=params.max_wait)
    return Planner(strategy, launch_rows=launch_rows, prefill_chunk=prefill_chunk, entry=depths[0])


def make_stage_planner(
    params: SchedulingParams,
    costs: SegmentCosts,
    stages: Stages,
    depths: Sequence[int],
    *,
    residents: int,
    prefill_chunk: int,
) -> StagePlanner:
    """Of a pipeline: the strategy chooses in each of its stages.

    Args:
        depths: where rows may wait or end: 0, exits, where stages end.
        residents: see `make_planner`.
    """
    planners = []
    for stage, stop in enumerate(stages.stops):
        own = [depth for depth in depths if stages.start(stage) <= depth <= stop]
        planners.append(make_planner(params, costs, own, residents=residents, prefill_chunk=prefill_chunk))
    return StagePlanner(planners, costs, stages, depths, spreads=params.launch_rows is None)


def planner_for(
    params: SchedulingParams,
    costs: SegmentCosts,
    stages: Stages,
    depths: Sequence[int],
    *,
    residents: int,
    prefill_chunk: int,
) -> Planner | StagePlanner:
    """Of a pipeline, or of a model that is in one piece; see `make_stage_planner`."""
    if stages.count == 1:
        return make_planner(params, costs, depths, residents=residents, prefill_chunk=prefill_chunk)
    return make_stage_planner(params, costs, stages, depths, residents=residents, prefill_chunk=prefill_chunk)
