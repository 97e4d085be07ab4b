"""Zero bubble: its order, memory and length, beside those of 1F1B."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import InvalidPlanError, StageCosts, check, simulate
from megatron_ee.parallel.pipeline.timeline import Timeline, draw

Durations = tuple[int, ...]


def plan_of(num_stages: int, num_microbatches: int, *, early: bool = True, release: bool = False) -> Plan:
    return build_plan(
        "zero-bubble",
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        has_exits=[early] * (num_stages - 1) + [True],
        release_exits=release,
    )


def work(plan: Plan, stage: int) -> str:
    kinds = (Kind.F, Kind.X, Kind.B, Kind.W)
    return " ".join(f"{action.kind}{action.microbatch}" for action in plan.actions[stage] if action.kind in kinds)


def beside_1f1b(
    num_microbatches: int, forward: Durations, exits: Durations, backward: Durations, weight: Durations
) -> tuple[Timeline, Timeline]:
    """Zero bubble, and 1F1B whose B takes as long as B and W."""
    has_exits = [*(duration > 0 for duration in exits[:-1]), True]
    both = tuple(map(sum, zip(backward, weight, strict=True)))
    costs = {"zero-bubble": StageCosts(forward, exits, backward, weight), "1f1b": StageCosts(forward, exits, both)}
    ours, theirs = (
        simulate(
            build_plan(name, num_stages=len(forward), num_microbatches=num_microbatches, has_exits=has_exits), cost
        )
        for name, cost in costs.items()
    )
    return ours, theirs


def test_weights_stand_as_many_backwards_later_as_there_are_stages_before() -> None:
    plan = plan_of(3, 4)
    assert work(plan, 0) == "F0 F1 F2 X0 X1 X2 B0 W0 F3 X3 B1 W1 B2 W2 B3 W3"
    assert work(plan, 1) == "F0 F1 X0 X1 B0 F2 X2 B1 W0 F3 X3 B2 W1 B3 W2 W3"
    assert work(plan, 2) == "F0 X0 B0 F1 X1 B1 F2 X2 B2 W0 F3 X3 B3 W1 W2 W3"


def test_a_gradient_leaves_before_the_weights() -> None:
    kinds = (Kind.B, Kind.SEND_BACKWARD, Kind.W)
    order = [str(action) for action in plan_of(3, 4).actions[1] if action.kind in kinds]
    assert order[2:7] == ["B1@1", "send_backward1@1", "W0@1", "B2@1", "send_backward2@1"]


@given(st.integers(1, 8), st.integers(1, 20), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_valid_and_no_more_held_than_on_the_first_stage_of_1f1b(
    num_stages: int, num_microbatches: int, early: bool, release: bool
) -> None:
    plan = plan_of(num_stages, num_microbatches, early=early, release=release)
    check(plan)
    timeline = simulate(plan, lambda action: 1)
    assert max(timeline.peak_activations) <= min(num_stages, num_microbatches)
    for stage, held in enumerate(timeline.holdings):
        assert max(before for before, _ in held) == min(num_stages - stage, num_microbatches), "as with 1F1B"
        assert max(after for _, after in held) <= stage + 1


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, 6))
@settings(max_examples=150)
def test_length_with_equal_stages(
    num_stages: int, num_microbatches: int, forward: int, backward: int, weight: int
) -> None:
    """The paper's table has (P - 1) (F + B - W) idle on every stage, and (P - 1) (F + B + W) with 1F1B."""
    durations = ((forward,) * num_stages, (0,) * num_stages, (backward,) * num_stages, (weight,) * num_stages)
    ours, theirs = beside_1f1b(num_microbatches, *durations)
    busy, others = num_microbatches * (forward + backward + weight), num_stages - 1
    assert theirs.makespan == busy + others * (forward + backward + weight)
    overtaken = min(others, num_microbatches - 1)
    assert ours.makespan == busy + others * (forward + backward) - overtaken * min(forward, backward, weight)


def test_a_third_of_the_bubble() -> None:
    ours, theirs = beside_1f1b(16, (1,) * 8, (0,) * 8, (1,) * 8, (1,) * 8)
    assert (ours.makespan - 48, theirs.makespan - 48) == (7, 21)


@st.composite
def durations(draw: st.DrawFn, *, equal: bool) -> tuple[Durations, Durations, Durations, Durations]:
    num_stages = draw(st.integers(1, 6))

    def of_kind(exits: bool = False) -> Durations:
        if equal:
            return (draw(st.integers(0, 6)),) * num_stages
        return tuple(draw(st.lists(st.integers(0, 12 if exits else 6), min_size=num_stages, max_size=num_stages)))

    return of_kind(), of_kind(exits=True), of_kind(), of_kind()


@given(st.integers(1, 12), durations(equal=False))
@settings(max_examples=300)
def test_no_forward_and_no_backward_ends_later_than_with_1f1b(
    num_microbatches: int, drawn: tuple[Durations, Durations, Durations, Durations]
) -> None:
    """So a step takes longer by the W's that are left on a stage, at most."""
    ours, theirs = beside_1f1b(num_microbatches, *drawn)
    weight = drawn[-1]
    for stage, (lane, other_lane) in enumerate(zip(ours.spans, theirs.spans, strict=True)):
        ends = {span.action: span.end for span in other_lane}
        for span in lane:
            if span.action.kind is not Kind.W:
                # In 1F1B the gradient is sent once W is done, too.
                assert span.end <= ends[span.action] - weight[stage] * (span.action.kind is Kind.B)
        left = min(stage, num_microbatches - 1) * weight[stage]
        assert lane[-1].end <= other_lane[-1].end + left


@given(st.integers(1, 12), durations(equal=True))
@settings(max_examples=200)
def test_never_longer_than_1f1b_with_equal_stages(
    num_microbatches: int, drawn: tuple[Durations, Durations, Durations, Durations]
) -> None:
    ours, theirs = beside_1f1b(num_microbatches, *drawn)
    assert ours.makespan <= theirs.makespan


def test_long_weights_on_a_late_stage_that_waits_for_forwards_make_it_longer() -> None:
    """1F1B runs the last stage's W while it waits for a slow forward; here it is still to be done."""
    ours, theirs = beside_1f1b(2, (10, 1), (0, 0), (1, 1), (0, 5))
    assert (ours.makespan, theirs.makespan) == (32, 28)


def _edited(plan: Plan, stage: int, edit: Callable[[list[Action]], object]) -> Plan:
    lanes = [list(actions) for actions in plan.actions]
    edit(lanes[stage])
    return replace(plan, actions=tuple(map(tuple, lanes)))


W1, B1 = Action(Kind.W, 1, 0, 1), Action(Kind.B, 1, 0, 1)


def test_broken_rules_are_named() -> None:
    plan = plan_of(2, 3)

    def early(lane: list[Action]) -> None:
        lane.remove(W1)
        lane.insert(lane.index(B1), W1)

    edits = {
        "W1@1 is missing: B1@1 asks for it": lambda lane: lane.remove(W1),
        "W1@1 has no B1@1 before it": early,
        "W1@1 is there twice": lambda lane: lane.append(W1),
    }
    for message, edit in edits.items():
        with pytest.raises(InvalidPlanError, match=message):
            check(_edited(plan, 1, edit))


def test_drawing() -> None:
    timeline = simulate(plan_of(2, 3), StageCosts((1, 1), (1, 1), (1, 1), (1, 1)))
    assert draw(timeline, width=15) == (
        "zero-bubble: makespan 13, bubble 7.7% (a forward, A backward, * weights, + exits, . idle)\n"
        "0 ab++A*c+B*.C*\n"
        "1 .a+Ab+B*c+C**"
    )
