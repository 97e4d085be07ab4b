"""What each schedule's plan looks like: the order, where X stands, and how many micro-batches live at once."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan
from megatron_ee.parallel.pipeline.schedules import SCHEDULES, build_plan
from megatron_ee.parallel.pipeline.simulate import check, simulate

TRAINING = ["gpipe", "1f1b", "interleaved"]
IN_ROUNDS = ["interleaved", "forward-only"]


@st.composite
def plans(draw: st.DrawFn, schedules: list[str] | None = None) -> tuple[Plan, list[bool]]:
    num_stages = draw(st.integers(1, 5))
    schedule = draw(st.sampled_from(schedules or sorted(SCHEDULES)))
    num_chunks = draw(st.integers(1, 3)) if schedule in IN_ROUNDS else 1
    num_others = num_stages * num_chunks - 1
    has_exits = [*draw(st.lists(st.booleans(), min_size=num_others, max_size=num_others)), True]
    num_microbatches = draw(st.integers(1, 8)) * (num_stages if schedule == "interleaved" else 1)
    plan = build_plan(
        schedule,
        num_stages=num_stages,
        num_chunks=num_chunks,
        num_microbatches=num_microbatches,
        has_exits=has_exits,
    )
    return plan, has_exits


def lane(plan: Plan, stage: int) -> str:
    """A stage's actions as text, with `>` for a send and `<` for a receive."""
    short = {
        Kind.SEND_FORWARD: ">F",
        Kind.RECV_FORWARD: "<F",
        Kind.SEND_BACKWARD: ">B",
        Kind.RECV_BACKWARD: "<B",
    }
    return " ".join(f"{short.get(action.kind, action.kind)}{action.microbatch}" for action in plan.actions[stage])


def test_1f1b_runs_exits_between_the_send_and_the_wait() -> None:
    plan = build_plan("1f1b", num_stages=3, num_microbatches=4, has_exits=[True, False, True])
    assert lane(plan, 0) == "F0 >F0 F1 >F1 F2 >F2 X0 X1 X2 <B0 B0 F3 >F3 X3 <B1 B1 <B2 B2 <B3 B3"
    assert lane(plan, 1) == ("<F0 F0 >F0 <F1 F1 >F1 <B0 B0 >B0 <F2 F2 >F2 <B1 B1 >B1 <F3 F3 >F3 <B2 B2 >B2 <B3 B3 >B3")
    assert lane(plan, 2) == "<F0 F0 X0 B0 >B0 <F1 F1 X1 B1 >B1 <F2 F2 X2 B2 >B2 <F3 F3 X3 B3 >B3"


def test_gpipe_runs_exits_before_the_first_wait() -> None:
    plan = build_plan("gpipe", num_stages=2, num_microbatches=2, has_exits=[True, True])
    assert lane(plan, 0) == "F0 >F0 F1 >F1 X0 X1 <B0 B0 <B1 B1"
    assert lane(plan, 1) == "<F0 F0 <F1 F1 X0 B0 >B0 X1 B1 >B1"


def test_forward_only_has_no_backward_and_runs_exits_at_once() -> None:
    plan = build_plan("forward-only", num_stages=2, num_microbatches=2, has_exits=[True, True])
    assert lane(plan, 0) == "F0 >F0 X0 F1 >F1 X1"
    assert lane(plan, 1) == "<F0 F0 X0 <F1 F1 X1"


def test_exits_may_wait_for_their_own_gradient() -> None:
    plan = build_plan("1f1b", num_stages=3, num_microbatches=4, has_exits=[True, False, True], release_exits=True)
    assert lane(plan, 0) == "F0 >F0 F1 >F1 F2 >F2 X0 <B0 B0 F3 >F3 X1 <B1 B1 X2 <B2 B2 X3 <B3 B3"
    assert lane(plan, 2) == "<F0 F0 X0 B0 >B0 <F1 F1 X1 B1 >B1 <F2 F2 X2 B2 >B2 <F3 F3 X3 B3 >B3"


@given(st.sampled_from(TRAINING), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=60)
def test_released_exits_stand_before_their_own_gradient(
    schedule: str, num_stages: int, num_chunks: int, groups: int, early: bool
) -> None:
    num_chunks = num_chunks if schedule == "interleaved" else 1
    has_exits = [early] * (num_stages * num_chunks - 1) + [True]
    pipeline = {"num_stages": num_stages, "num_chunks": num_chunks, "num_microbatches": groups * num_stages}
    plan = build_plan(schedule, **pipeline, has_exits=has_exits, release_exits=True)
    usual = build_plan(schedule, **pipeline, has_exits=has_exits)
    check(plan)
    for actions, usual_actions in zip(plan.actions, usual.actions, strict=True):
        assert set(actions) == set(usual_actions)
        for exits, *after in zip(actions, actions[1:], actions[2:], strict=False):
            if exits.kind is Kind.X:
                backward = after[0] if after[0].kind is Kind.B else after[1]
                assert backward == Action(Kind.B, exits.stage, exits.chunk, exits.microbatch)


def test_one_stage_sends_nothing() -> None:
    for schedule, order in {"1f1b": "F0 X0 B0 F1 X1 B1", "gpipe": "F0 F1 X0 B0 X1 B1"}.items():
        assert lane(build_plan(schedule, num_stages=1, num_microbatches=2, has_exits=[True]), 0) == order


@given(plans())
@settings(max_examples=150)
def test_every_plan_is_valid_and_complete(case: tuple[Plan, list[bool]]) -> None:
    plan, has_exits = case
    check(plan)
    for stage, actions in enumerate(plan.actions):
        expected = set()
        for chunk in range(plan.num_chunks):
            has_exit = has_exits[chunk * plan.num_stages + stage]
            work = [Kind.F] + [Kind.X] * has_exit + [Kind.B] * (plan.schedule != "forward-only")
            work += [Kind.W] * (plan.schedule == "zero-bubble")
            expected |= {Action(kind, stage, chunk, i) for kind in work for i in range(plan.num_microbatches)}
        assert {action for action in actions if action.kind in (Kind.F, Kind.X, Kind.B, Kind.W)} == expected


@given(plans())
@settings(max_examples=150)
def test_exits_run_after_the_send_and_before_the_wait_for_the_gradient(case: tuple[Plan, list[bool]]) -> None:
    plan, _ = case
    for actions in plan.actions:
        order = {(action.kind, action.chunk, action.microbatch): index for index, action in enumerate(actions)}
        for kind, chunk, microbatch in order:
            if kind is not Kind.X:
                continue
            here = order[kind, chunk, microbatch]
            assert order.get((Kind.SEND_FORWARD, chunk, microbatch), -1) < here
            assert here < order.get((Kind.RECV_BACKWARD, chunk, microbatch), len(actions))


@given(plans(schedules=TRAINING))
@settings(max_examples=100)
def test_microbatches_alive(case: tuple[Plan, list[bool]]) -> None:
    plan, _ = case
    num_stages, num_chunks, num_microbatches = plan.num_stages, plan.num_chunks, plan.num_microbatches
    alive = {
        "gpipe": tuple(num_microbatches for _ in range(num_stages)),
        "1f1b": tuple(min(num_stages - stage, num_microbatches) for stage in range(num_stages)),
        "interleaved": tuple(
            min(2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages + 1, num_chunks * num_microbatches)
            for stage in range(num_stages)
        ),
    }
    assert simulate(plan, lambda action: 1).peak_activations == alive[plan.schedule]


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4))
def test_chunks_divide_the_bubble(num_stages: int, num_chunks: int, groups: int) -> None:
    """T = M v (F + B) + (P - 1) (F + B) with F and B of one chunk: the bubble is that of one chunk, not of v."""
    num_microbatches, has_exits = groups * num_stages, [False] * (num_stages * num_chunks - 1) + [True]
    plan = build_plan(
        "interleaved",
        num_stages=num_stages,
        num_chunks=num_chunks,
        num_microbatches=num_microbatches,
        has_exits=has_exits,
    )
    makespan = simulate(plan, lambda action: {Kind.F: 1, Kind.X: 0, Kind.B: 2}[action.kind]).makespan
    assert makespan == 3 * (num_microbatches * num_chunks + num_stages - 1)


def test_validation_holds_one_microbatch_at_a_time() -> None:
    plan = build_plan("forward-only", num_stages=3, num_microbatches=4, has_exits=[True, False, True])
    assert simulate(plan, lambda action: 1).peak_activations == (1, 1, 1)


def test_unknown_schedule_names_the_choices() -> None:
    choices = "gpipe, 1f1b, filled-1f1b, interleaved, zero-bubble, forward-only"
    with pytest.raises(ValueError, match=f"unknown schedule '1b1f'; choose from {choices}"):
        build_plan("1b1f", num_stages=1, num_microbatches=1, has_exits=[True])


@pytest.mark.parametrize(
    ("num_stages", "num_microbatches", "has_exits", "message"),
    [
        (0, 1, [], "not 0 stages"),
        (1, 0, [True], "0 micro-batches"),
        (2, 1, [True], "1 entries for 2 stages"),
        (2, 1, [True, False], "the last stage has no exit"),
    ],
)
def test_impossible_pipelines_are_refused(
    num_stages: int, num_microbatches: int, has_exits: list[bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan("1f1b", num_stages=num_stages, num_microbatches=num_microbatches, has_exits=has_exits)


def test_plans_are_made_without_torch() -> None:
    modules = ("deliveries", "fill_planner", "schedules", "simulate", "timeline", "validity")
    imports = "; ".join(f"import megatron_ee.parallel.pipeline.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", f"{imports}; import sys; assert 'torch' not in sys.modules"], check=True)
