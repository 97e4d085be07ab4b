"""Plans that break one rule each, deadlocks, and plans shuffled at random."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.parallel.pipeline.plan import Action, Fill, Kind, Plan, make_plan
from megatron_ee.parallel.pipeline.schedules import SCHEDULES, build_plan
from megatron_ee.parallel.pipeline.simulate import DeadlockError, InvalidPlanError, check

Lanes = list[list[Action]]
Edit = Callable[[Lanes], object]


def edited(plan: Plan, edit: Edit) -> Plan:
    lanes = [list(actions) for actions in plan.actions]
    edit(lanes)
    return replace(plan, actions=tuple(tuple(lane) for lane in lanes))


def action(name: str) -> Action:
    """`F0@1` is F of micro-batch 0 on stage 1."""
    work, stage = name.split("@")
    return Action(Kind(work.rstrip("0123456789")), int(stage), 0, int(work[-1]))


def drop(*names: str) -> Edit:
    return lambda lanes: [lanes[action(name).stage].remove(action(name)) for name in names]


def swap(first: str, second: str) -> Edit:
    def edit(lanes: Lanes) -> None:
        lane = lanes[action(first).stage]
        i, j = lane.index(action(first)), lane.index(action(second))
        lane[i], lane[j] = lane[j], lane[i]

    return edit


def append(stage: int, name: str) -> Edit:
    return lambda lanes: lanes[stage].append(action(name))


BROKEN = {
    "B before X": (swap("X1@1", "B1@1"), "B1@1 has no X1@1 before it"),
    "B before F": (swap("F0@1", "B0@1"), "B0@1 has no F0@1 before it"),
    "X before F": (swap("F1@0", "X1@0"), "X1@0 has no F1@0 before it"),
    "B without X on a stage with exits": (drop("X0@0"), "B0@0 has no X0@0 before it"),
    "F before its input": (swap("F0@1", "recv_forward0@1"), "F0@1 has no recv_forward0@1 before it"),
    "B before its gradient": (swap("B0@0", "recv_backward0@0"), "B0@0 has no recv_backward0@0 before it"),
    "send before F": (swap("F0@0", "send_forward0@0"), "send_forward0@0 has no F0@0 before it"),
    "send before B": (swap("B0@1", "send_backward0@1"), "send_backward0@1 has no B0@1 before it"),
    "twice": (append(0, "F0@0"), "F0@0 is there twice"),
    "another stage's": (append(1, "B0@0"), "B0@0 cannot stand on stage 1 of 2"),
    "an unknown micro-batch": (append(0, "F7@0"), "F7@0 is not of the 3 micro-batches"),
    "nobody before the first stage": (append(0, "recv_forward0@0"), "recv_forward0@0 has no stage at its other end"),
    "nobody after the last stage": (append(1, "send_forward0@1"), "send_forward0@1 has no stage at its other end"),
    "a message that is not received": (drop("recv_backward2@0", "B2@0"), "recv_backward2@0 is missing"),
    "a message that is not sent": (drop("send_forward1@0"), "recv_forward1@1 waits for a message that nobody sends"),
    "a gradient that is not sent": (
        drop("send_backward1@1"),
        "recv_backward1@0 waits for a message that nobody sends",
    ),
    "a gradient left out at both ends": (
        drop("send_backward1@1", "recv_backward1@0"),
        "B1@0 has no recv_backward1@0 before it",
    ),
    "a micro-batch that never enters": (
        drop("F2@0", "X2@0", "send_forward2@0", "recv_backward2@0", "B2@0"),
        "F2@0 is missing: every micro-batch enters",
    ),
    "input that is not worked on": (
        drop("F2@1", "X2@1", "B2@1", "send_backward2@1", "recv_backward2@0", "B2@0"),
        "F2@1 is missing: recv_forward2@1 asks for it",
    ),
    "a gradient that is not worked on": (drop("B2@0"), "B2@0 is missing: recv_backward2@0 asks for it"),
    "a micro-batch that is not trained": (
        drop("B2@1", "send_backward2@1", "recv_backward2@0", "B2@0"),
        "B2@1 is missing: F2@1 asks for it",
    ),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_rules_are_named(edit: Edit, message: str) -> None:
    plan = build_plan("1f1b", num_stages=2, num_microbatches=3, has_exits=[True, True])
    with pytest.raises(InvalidPlanError) as error:
        check(edited(plan, edit))
    assert message in str(error.value)
    assert not isinstance(error.value, DeadlockError)


def test_links_keep_their_order() -> None:
    plan = build_plan("gpipe", num_stages=2, num_microbatches=2, has_exits=[True, True])

    def send_late_and_crossed(lanes: Lanes) -> None:
        sends = [action("send_forward1@0"), action("send_forward0@0")]
        work = [step for step in lanes[0] if step not in sends]
        lanes[0] = work[:2] + sends + work[2:]

    with pytest.raises(InvalidPlanError, match="recv_forward0@1 would take the message of recv_forward1@1"):
        check(edited(plan, send_late_and_crossed))


def test_validation_without_an_exit_is_named() -> None:
    plan = build_plan("forward-only", num_stages=2, num_microbatches=2, has_exits=[True, True])
    with pytest.raises(InvalidPlanError, match="X1@0 is missing: F1@0 asks for it"):
        check(edited(plan, drop("X1@0")))


def test_stages_and_lanes_agree_in_number() -> None:
    with pytest.raises(InvalidPlanError, match="actions for 1 stages in a plan of 2"):
        check(Plan("1f1b", 2, 1, 1, ((),)))


def test_deadlock_names_every_stuck_stage() -> None:
    """Stage 0 wants the gradient of micro-batch 0 before it sends micro-batch 1, which stage 1 wants first."""
    plan = build_plan("gpipe", num_stages=2, num_microbatches=2, has_exits=[False, True])

    def wait_first(lanes: Lanes) -> None:
        lanes[0].remove(action("recv_backward0@0"))
        lanes[0].insert(lanes[0].index(action("F1@0")), action("recv_backward0@0"))

    with pytest.raises(DeadlockError) as error:
        check(edited(plan, wait_first))
    assert error.value.waiting == (action("recv_backward0@0"), action("recv_forward1@1"))
    message = "deadlock: stage 0 waits at recv_backward0@0, stage 1 waits at recv_forward1@1"
    assert str(error.value) == message


def test_only_a_fill_may_turn_round_before_the_last_stage() -> None:
    """No output goes on from where it turns, and no gradient comes back to there."""
    work = [[action(name) for name in names.split()] for names in ("F0@0 F1@0 X1@0 X0@0 B1@0 B0@0", "F0@1 X0@1 B0@1")]
    check(make_plan("filled", 2, work, fills=(Fill("warmup", 0),)))
    with pytest.raises(InvalidPlanError, match="F1@1 is missing: micro-batch 1 is for this stage too"):
        check(make_plan("filled", 2, work))


# Micro-batches 0 to 3 are regular; 4 turns at stage 1, 5 at stage 0, 6 trains stages 1 and 2, and 7 stage 2.
FILLS = (Fill("warmup", 1), Fill("warmup", 0), Fill("cooldown", 1), Fill("cooldown", 2))
BROKEN_FILLS = {
    "no loss of a fill on its way": (drop("X4@0"), "B4@0 has no X4@0 before it"),
    "no loss where a fill turns": (drop("X5@0"), "B5@0 has no X5@0 before it"),
    "a gradient that a fill doesn't wait for": (drop("recv_backward4@0"), "B4@0 has no recv_backward4@0 before it"),
    "an output that is not sent": (drop("send_forward4@0"), "recv_forward4@1 waits for a message that nobody sends"),
    "an output that is not received": (drop("recv_forward4@1"), "F4@1 has no recv_forward4@1 before it"),
    "a gradient that is not sent": (drop("send_backward4@1"), "recv_backward4@0 waits for a message that nobody"),
    "a fill that doesn't turn": (drop("X5@0", "B5@0"), "B5@0 is missing: F5@0 asks for it"),
    "a fill that turns early": (
        drop("send_forward4@0", "recv_forward4@1", "F4@1", "X4@1", "B4@1", "send_backward4@1", "recv_backward4@0"),
        "F4@1 is missing: micro-batch 4 is for this stage too",
    ),
    "a backward that jumps a stage": (
        drop("recv_backward6@1", "X6@1", "B6@1", "send_backward6@2"),
        "B6@1 is missing: micro-batch 6 is for this stage too",
    ),
    "a backward too many": (append(0, "B6@0"), "B6@0 has no X6@0 before it"),
    "a loss and a backward too many": (
        lambda lanes: lanes[0].extend([action("X6@0"), action("B6@0")]),
        "B6@0 has no recv_backward6@0 before it",
    ),
    "a loss without a backward": (append(1, "X7@1"), "X7@1 has no place on this stage"),
    "a forward too many": (append(1, "F5@1"), "F5@1 has no recv_forward5@1 before it"),
    "inputs of two fills crossed": (swap("recv_forward6@1", "recv_forward7@1"), "F6@1 has no recv_forward6@1 before"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN_FILLS.values(), ids=BROKEN_FILLS.keys())
def test_broken_fills_are_named(edit: Edit, message: str) -> None:
    plan = build_plan("filled-1f1b", num_stages=3, num_microbatches=4, has_exits=[True] * 3, fills=FILLS)
    check(plan)
    with pytest.raises(InvalidPlanError) as error:
        check(edited(plan, edit))
    assert message in str(error.value)


def test_fills_keep_the_order_of_their_link() -> None:
    """Both ends consistent in themselves: only the order between them is wrong."""
    plan = build_plan("filled-1f1b", num_stages=3, num_microbatches=4, has_exits=[True] * 3, fills=FILLS)

    def receive_both_crossed(lanes: Lanes) -> None:
        first, second = action("recv_forward6@1"), action("recv_forward7@1")
        lanes[1].remove(second)
        lanes[1].insert(lanes[1].index(first), second)

    with pytest.raises(InvalidPlanError, match="recv_forward7@1 would take the message of recv_forward6@1"):
        check(edited(plan, receive_both_crossed))


@given(st.data())
@settings(max_examples=200)
def test_no_action_of_a_filled_plan_can_be_left_out(data: st.DataObject) -> None:
    plan = build_plan("filled-1f1b", num_stages=3, num_microbatches=4, has_exits=[True] * 3, fills=FILLS)
    stage = data.draw(st.integers(0, 2))
    index = data.draw(st.integers(0, len(plan.actions[stage]) - 1))
    with pytest.raises(InvalidPlanError):
        check(edited(plan, lambda lanes: lanes[stage].pop(index)))


@given(st.data())
@settings(max_examples=300)
def test_two_actions_swapped_leave_a_valid_plan_or_an_invalid_one(data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, 4))
    plan = build_plan(
        data.draw(st.sampled_from(sorted(SCHEDULES))),
        num_stages=num_stages,
        num_microbatches=data.draw(st.integers(1, 4)),
        has_exits=[*data.draw(st.lists(st.booleans(), min_size=num_stages - 1, max_size=num_stages - 1)), True],
    )
    places = st.integers(0, num_stages - 1).flatmap(
        lambda stage: st.tuples(st.just(stage), st.integers(0, len(plan.actions[stage]) - 1))
    )
    (stage, i), (other, j) = data.draw(places), data.draw(places)

    def exchange(lanes: Lanes) -> None:
        lanes[stage][i], lanes[other][j] = lanes[other][j], lanes[stage][i]

    with suppress(InvalidPlanError):
        check(edited(plan, exchange))
