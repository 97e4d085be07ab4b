"""1F1B with fills: what runs where, for any fills; and which of them the planner says cost nothing."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.parallel.pipeline.exits import place_exits
from megatron_ee.parallel.pipeline.fill_planner import makespan_of, plan_fills
from megatron_ee.parallel.pipeline.plan import Action, Fill, Kind, Plan
from megatron_ee.parallel.pipeline.schedules import Pipeline, build_plan
from megatron_ee.parallel.pipeline.simulate import StageCosts, check, simulate

WORK = (Kind.F, Kind.X, Kind.B)


def plan_of(pipeline: Pipeline, schedule: str = "filled-1f1b", *, release_exits: bool = False) -> Plan:
    return build_plan(
        schedule,
        num_stages=pipeline.num_stages,
        num_microbatches=pipeline.num_microbatches,
        has_exits=pipeline.has_exits,
        fills=pipeline.fills,
        release_exits=release_exits,
    )


@st.composite
def pipelines(draw: st.DrawFn, *, max_fills: int = 0) -> Pipeline:
    num_stages = draw(st.integers(1, 8))
    early = draw(st.lists(st.booleans(), min_size=num_stages - 1, max_size=num_stages - 1))
    legal = [Fill("warmup", stage) for stage, has_exit in enumerate(early) if has_exit]
    legal += [Fill("cooldown", stage) for stage in range(1, num_stages)]
    fills = draw(st.lists(st.sampled_from(legal), max_size=max_fills)) if legal else []
    return Pipeline(num_stages, draw(st.integers(1, 10)), (*early, True), fills=tuple(fills))


def costs_of(draw: st.DrawFn, pipeline: Pipeline) -> StageCosts:
    """Integers, so that lengths are compared exactly."""
    durations = st.lists(st.integers(0, 9), min_size=pipeline.num_stages, max_size=pipeline.num_stages)
    return StageCosts(*(tuple(draw(durations)) for _ in WORK))


def equal_stages(num_stages: int, num_microbatches: int) -> Pipeline:
    return Pipeline(num_stages, num_microbatches, (True,) * num_stages)


def equal_costs(num_stages: int, *, exits: float = 0.3, backward: float = 2.0) -> StageCosts:
    return StageCosts((1.0,) * num_stages, (exits,) * num_stages, (backward,) * num_stages)


@given(pipelines(), st.booleans())
@settings(max_examples=100)
def test_without_fills_it_is_1f1b(pipeline: Pipeline, release_exits: bool) -> None:
    filled = plan_of(pipeline, release_exits=release_exits)
    assert filled.actions == plan_of(pipeline, "1f1b", release_exits=release_exits).actions


@given(pipelines(max_fills=30), st.booleans())
@settings(max_examples=300)
def test_any_fills_give_a_valid_plan_without_deadlock_and_no_more_memory(
    pipeline: Pipeline, release_exits: bool
) -> None:
    plan = plan_of(pipeline, release_exits=release_exits)
    check(plan)
    held = simulate(plan, lambda action: 1).peak_activations
    usual = simulate(plan_of(replace(pipeline, fills=()), "1f1b"), lambda action: 1).peak_activations
    assert all(filled <= regular for filled, regular in zip(held, usual, strict=True))


@given(pipelines(max_fills=30), st.booleans())
@settings(max_examples=150)
def test_every_fill_runs_exactly_where_it_should(pipeline: Pipeline, release_exits: bool) -> None:
    plan = plan_of(pipeline, release_exits=release_exits)
    last, num_regular = pipeline.num_stages - 1, pipeline.num_microbatches
    assert (plan.num_regular, plan.num_microbatches) == (num_regular, num_regular + len(pipeline.fills))
    for microbatch in range(plan.num_microbatches):
        fill = plan.fill_of(microbatch)
        assert fill == (pipeline.fills[microbatch - num_regular] if microbatch >= num_regular else None)
        forward, trained = range(last + 1), range(last + 1)
        if fill:
            forward = range(fill.stage + 1) if fill.kind == "warmup" else range(last + 1)
            trained = range(fill.stage + 1) if fill.kind == "warmup" else range(fill.stage, last + 1)
        expected = {Action(Kind.F, stage, 0, microbatch) for stage in forward}
        expected |= {Action(Kind.B, stage, 0, microbatch) for stage in trained}
        expected |= {Action(Kind.X, stage, 0, microbatch) for stage in trained if pipeline.has_exits[stage]}
        expected |= {Action(Kind.RECV_FORWARD, stage, 0, microbatch) for stage in forward if stage - 1 in forward}
        expected |= {Action(Kind.SEND_FORWARD, stage, 0, microbatch) for stage in forward if stage + 1 in forward}
        expected |= {Action(Kind.RECV_BACKWARD, stage, 0, microbatch) for stage in trained if stage + 1 in trained}
        expected |= {Action(Kind.SEND_BACKWARD, stage, 0, microbatch) for stage in trained if stage - 1 in trained}
        assert {step for lane in plan.actions for step in lane if step.microbatch == microbatch} == expected


def test_order_by_hand() -> None:
    """Three stages: 4 turns at stage 1, 5 at stage 0, 6 trains the last two stages."""
    fills = (Fill("warmup", 1), Fill("warmup", 0), Fill("cooldown", 1))
    plan = plan_of(Pipeline(3, 4, (True,) * 3, fills=fills))
    lanes = [" ".join(f"{step.kind}{step.microbatch}" for step in lane if step.kind in WORK) for lane in plan.actions]
    assert lanes == [
        "F0 F4 F5 X5 B5 F1 X0 X4 X1 B4 F2 X2 B0 F3 X3 B1 F6 B2 B3",
        "F0 F4 X4 B4 F1 X0 X1 B0 F2 X2 B1 F3 X3 B2 F6 X6 B3 B6",
        "F0 X0 B0 F1 X1 B1 F2 X2 B2 F3 X3 B3 F6 X6 B6",
    ]


@pytest.mark.parametrize(
    ("fill", "has_exits", "message"),
    [
        (Fill("warmup", 2), (True, True, True), "turns round before the last of 3 stages"),
        (Fill("warmup", -1), (True, True, True), "turns round before the last of 3 stages"),
        (Fill("warmup", 1), (True, False, True), "the stage where it turns round has no exit"),
        (Fill("cooldown", 0), (True, True, True), "from 1 to 2"),
        (Fill("cooldown", 3), (True, True, True), "from 1 to 2"),
    ],
)
def test_fills_without_a_place_are_refused(fill: Fill, has_exits: tuple[bool, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline(3, 4, has_exits, fills=(fill,))


def test_fills_need_their_schedule_and_one_chunk() -> None:
    fills = (Fill("warmup", 0),)
    with pytest.raises(ValueError, match="fills are for filled-1f1b, not for gpipe"):
        plan_of(Pipeline(2, 2, (True, True), fills=fills), "gpipe")
    with pytest.raises(ValueError, match="one chunk a stage, not 2"):
        Pipeline(2, 2, (True,) * 4, num_chunks=2, fills=fills)
    with pytest.raises(ValueError, match="one chunk a stage, not 2"):
        plan_fills(Pipeline(2, 2, (True,) * 4, num_chunks=2), equal_costs(2))


@given(st.data(), pipelines(max_fills=6), st.integers(0, 3), st.booleans())
@settings(max_examples=150)
def test_the_planners_own_makespan_is_the_simulators(
    data: st.DataObject, pipeline: Pipeline, transfer: int, release_exits: bool
) -> None:
    costs = costs_of(data.draw, pipeline)
    plan = plan_of(pipeline, release_exits=release_exits)
    lanes = [[(step.kind, step.microbatch) for step in lane if step.kind in WORK] for lane in plan.actions]
    assert makespan_of(lanes, costs, transfer) == simulate(plan, costs, transfer=transfer).makespan


@given(st.data(), pipelines(), st.integers(0, 3), st.booleans())
@settings(max_examples=80)
def test_planned_fills_cost_neither_time_nor_memory(
    data: st.DataObject, pipeline: Pipeline, transfer: int, release_exits: bool
) -> None:
    costs = costs_of(data.draw, pipeline)
    fills = plan_fills(pipeline, costs, transfer=transfer, release_exits=release_exits)
    usual, filled = (
        simulate(plan_of(case, release_exits=release_exits), costs, transfer=transfer)
        for case in (pipeline, replace(pipeline, fills=fills))
    )
    assert filled.makespan <= usual.makespan
    assert all(now <= before for now, before in zip(filled.peak_activations, usual.peak_activations, strict=True))


def test_fills_that_fit_a_short_step_only_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned with 4 of 9 micro-batches, two fills fit; with all 9, the second one costs time."""
    pipeline, costs = equal_stages(4, 9), StageCosts((2, 5, 3, 2), (3, 4, 3, 0), (3, 1, 1, 0))
    monkeypatch.setattr("megatron_ee.parallel.pipeline.fill_planner._SHORT", 1)
    assert len(plan_fills(replace(pipeline, num_microbatches=4), costs)) == 2
    fills = plan_fills(pipeline, costs)
    assert len(fills) == 1
    usual, filled = (simulate(plan_of(case), costs) for case in (pipeline, replace(pipeline, fills=fills)))
    assert filled.makespan <= usual.makespan


@given(st.data(), st.floats(0.05, 5), st.integers(2, 9), st.integers(0, 4))
@settings(max_examples=60)
def test_no_more_fills_than_idle_time_has_room_for(
    data: st.DataObject, ratio: float, num_stages: int, more: int
) -> None:
    """Equal stages without X: r (P-1-s) of idle time on stage s in the warm-up, r s in the cool-down."""
    early = data.draw(st.lists(st.booleans(), min_size=num_stages - 1, max_size=num_stages - 1))
    pipeline = Pipeline(num_stages, num_stages + more, (*early, True))
    fills = plan_fills(pipeline, equal_costs(num_stages, exits=0, backward=ratio))
    for stage in range(num_stages):
        num_warmup, num_cooldown = (
            sum(fill.kind == kind and fill.trains(stage) for fill in fills) for kind in ("warmup", "cooldown")
        )
        assert num_warmup * (1 + ratio) <= ratio * (num_stages - 1 - stage) + 1e-6
        assert num_cooldown * (1 + ratio) <= ratio * stage + 1e-6


@pytest.mark.parametrize("num_stages", [4, 8])
def test_planner_is_worth_its_while(num_stages: int) -> None:
    pipeline, costs = equal_stages(num_stages, 2 * num_stages), equal_costs(num_stages)
    fills = plan_fills(pipeline, costs)
    assert {fill.kind for fill in fills} == {"warmup", "cooldown"}
    usual, filled = (simulate(plan_of(case), costs) for case in (pipeline, replace(pipeline, fills=fills)))
    assert filled.bubble_fraction < 0.6 * usual.bubble_fraction


def test_more_fills_than_after_the_warmup_forwards() -> None:
    """P = 8, F = 1, B = 2, X = 0: fills that enter after all of the warm-up's forwards can be 4 at the most, on 4, 3, 2
    and 1 stages: EE-LLM's bound of 10 pieces in all."""
    fills = plan_fills(equal_stages(8, 16), equal_costs(8, exits=0))
    assert sum(fill.stage + 1 for fill in fills if fill.kind == "warmup") == 15
    assert [fill.stage for fill in fills if fill.kind == "cooldown"] == [2, 3, 5, 6]  # floor(2s / 3) on stage s


def test_ee_llm_deadlock_at_eight_stages() -> None:
    """EE-LLM's filled 1F1B stands still at P = 8, and hands labels to the wrong micro-batch at P = 4."""
    for num_stages in (4, 8):
        for num_microbatches in (1, num_stages - 1, num_stages, 2 * num_stages):
            pipeline = equal_stages(num_stages, num_microbatches)
            turns = [Fill("warmup", stage) for stage in reversed(range(num_stages - 1))]
            lasts = [Fill("cooldown", stage) for stage in range(1, num_stages)]
            for fills in (turns + lasts, lasts + turns, 3 * turns[::-1] + 3 * lasts[::-1]):
                check(plan_of(replace(pipeline, fills=tuple(fills))))


def test_planner_is_deterministic_and_refuses_impossible_durations() -> None:
    pipeline = equal_stages(6, 9)
    assert plan_fills(pipeline, equal_costs(6)) == plan_fills(pipeline, equal_costs(6))
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="nothing may be negative"):
            plan_fills(pipeline, equal_costs(6, exits=bad))
        with pytest.raises(ValueError, match="nothing may be negative"):
            plan_fills(pipeline, equal_costs(6), transfer=bad)


def test_work_that_takes_no_time_ends() -> None:
    assert plan_fills(equal_stages(4, 4), StageCosts((0.0,) * 4, (0.0,) * 4, (0.0,) * 4))


def test_planner_tries_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called when a run starts: what costs it time is the number of steps that it lays out."""
    tried = 0

    def counting(*args: Any) -> float:
        nonlocal tried
        tried += 1
        return makespan_of(*args)

    monkeypatch.setattr("megatron_ee.parallel.pipeline.fill_planner.makespan_of", counting)
    plan_fills(equal_stages(8, 32), equal_costs(8))
    assert tried < 150


@pytest.mark.slow
def test_planner_serves_64_stages() -> None:
    pipeline, costs = equal_stages(64, 256), equal_costs(64)
    fills = plan_fills(pipeline, costs)
    assert len(fills) > 50
    usual, filled = (simulate(plan_of(case), costs) for case in (pipeline, replace(pipeline, fills=fills)))
    assert filled.makespan == pytest.approx(usual.makespan, rel=1e-9)


@given(st.data(), pipelines(), st.floats(0, 0.2))
@settings(max_examples=60)
def test_a_tolerance_is_kept_to(data: st.DataObject, pipeline: Pipeline, tolerance: float) -> None:
    costs = costs_of(data.draw, pipeline)
    fills = plan_fills(pipeline, costs, tolerance=tolerance)
    usual, filled = (simulate(plan_of(case), costs) for case in (pipeline, replace(pipeline, fills=fills)))
    assert filled.makespan <= usual.makespan * (1 + tolerance + 1e-6)
    assert all(now <= before for now, before in zip(filled.peak_activations, usual.peak_activations, strict=True))


def test_a_tolerance_makes_up_for_uneven_stages() -> None:
    """Stages that are 1 % apart leave gaps which are as much too short for a forward."""
    pipeline = equal_stages(8, 16)
    durations = tuple(1 + 0.01 * (stage % 2) for stage in range(8))
    costs = StageCosts(durations, (0.3,) * 8, tuple(2 * duration for duration in durations))
    assert len(plan_fills(pipeline, costs, tolerance=0.02)) > len(plan_fills(pipeline, costs))


def test_exits_of_a_fill_that_turns_stand_before_its_own_backward() -> None:
    steps = [(Kind.F, "regular"), (Kind.F, "turns"), (Kind.B, "turns"), (Kind.B, "regular")]
    placed = place_exits(steps, with_exits={"regular", "turns"}, wait_for_none={"turns"})
    assert [f"{kind} {key}" for kind, key in placed] == [
        *("F regular", "F turns", "X turns", "B turns"),
        *("X regular", "B regular"),
    ]
