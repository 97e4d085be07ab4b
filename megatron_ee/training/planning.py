"""The plan of a step: the config's schedule, with fills where it asks for them, proved before anything runs."""

from collections.abc import Mapping, Sequence

from megatron_ee.config import Config
from megatron_ee.parallel.chunks import Layout, count_idle, have_exits
from megatron_ee.parallel.costs import chunk_costs, costs_of
from megatron_ee.parallel.pipeline.fill_planner import plan_fills
from megatron_ee.parallel.pipeline.plan import Fill, Kind, Plan
from megatron_ee.parallel.pipeline.schedules import Pipeline, Schedule, build_plan
from megatron_ee.parallel.pipeline.simulate import InvalidPlanError, check
from megatron_ee.plugins import PluginError

FILLED = "filled-1f1b"
FORWARD_ONLY = "forward-only"
MEGATRON = "megatron"
ZERO_BUBBLE = "zero-bubble"


def plan_step(
    config: Config,
    layout: Layout,
    vocab_size: int,
    num_microbatches: int,
    *,
    fills: Sequence[Fill] | None = None,
    more_schedules: Mapping[str, Schedule] | None = None,
) -> Plan:
    """
    Args:
        num_microbatches: of one pipeline, without fills.
        fills: of schedule filled-1f1b; None: as many as the config's costs and tolerance leave room for.
        more_schedules: plug-ins'.

    Raises:
        PluginError: a plug-in's schedule gives a plan that cannot run.
    """
    if config.parallel.schedule != FILLED:
        fills = ()
    elif fills is None:
        pipeline = Pipeline(len(layout), num_microbatches, tuple(have_exits(layout)))
        costs = costs_of(config, vocab_size)
        fills = plan_fills(
            pipeline,
            chunk_costs(layout, config.exits, costs).per_stage,
            transfer=costs.transfer,
            release_exits=config.exits.release,
            tolerance=config.parallel.fill_tolerance,
        )
    return _checked_plan(
        schedule_of(config), layout, num_microbatches, fills, config.exits.release, more_schedules or {}
    )


def plan_validation(layout: Layout, num_microbatches: int) -> Plan:
    """F and X of every micro-batch."""
    return _checked_plan(FORWARD_ONLY, layout, num_microbatches, (), False, {})


def schedule_of(config: Config) -> str:
    """The schedule by its own name: megatron-core's two are in the order of ours, and where only exits are trained
    there are no backwards to order."""
    if config.training.trains == "exits":
        return FORWARD_ONLY
    if config.parallel.schedule != MEGATRON:
        return config.parallel.schedule
    return "interleaved" if config.parallel.chunks > 1 else "1f1b"


def _checked_plan(
    schedule: str,
    layout: Layout,
    num_microbatches: int,
    fills: Sequence[Fill],
    release_exits: bool,
    more_schedules: Mapping[str, Schedule],
) -> Plan:
    try:
        plan = build_plan(
            schedule,
            num_stages=len(layout) - count_idle(layout),
            num_idle=count_idle(layout),
            num_chunks=len(layout[0]),
            num_microbatches=num_microbatches,
            has_exits=have_exits(layout),
            fills=fills,
            release_exits=release_exits,
            more_schedules=more_schedules,
        )
        check(plan)
        if schedule != ZERO_BUBBLE and any(step.kind is Kind.W for steps in plan.actions for step in steps):
            raise PluginError("parallel.schedule", f"{schedule!r} has W, for which only {ZERO_BUBBLE} builds layers")
    except InvalidPlanError as error:  # a plug-in's; the built-in ones are tested
        raise PluginError("parallel.schedule", f"{schedule!r} gives an invalid plan: {error}") from error
    return plan
