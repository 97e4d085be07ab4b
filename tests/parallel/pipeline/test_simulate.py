"""The simulator against an independent critical path; its figures and its drawing on plans done by hand."""

import random
import time
from functools import cache

import pytest

from megatron_ee.parallel.costs import ChunkCosts
from megatron_ee.parallel.pipeline.plan import Action, Fill, Kind, Plan
from megatron_ee.parallel.pipeline.schedules import SCHEDULES, build_plan
from megatron_ee.parallel.pipeline.simulate import Cost, StageCosts, simulate
from megatron_ee.parallel.pipeline.timeline import Span, Timeline, draw


def two_stages(schedule: str = "1f1b", num_microbatches: int = 2) -> Timeline:
    """F = 1, X = 1, B = 2 on both stages."""
    plan = build_plan(schedule, num_stages=2, num_microbatches=num_microbatches, has_exits=[True, True])
    return simulate(plan, StageCosts((1, 1), (1, 1), (2, 2)))


def critical_path(plan: Plan, cost: Cost, transfer: float) -> float:
    """The longest path through the graph of actions, by the definition: latest predecessor, plus own duration."""
    senders = {Kind.RECV_FORWARD: (Kind.SEND_FORWARD, -1), Kind.RECV_BACKWARD: (Kind.SEND_BACKWARD, +1)}

    @cache
    def end(stage: int, index: int) -> float:
        action = plan.actions[stage][index]
        before = end(stage, index - 1) if index else 0
        if action.kind in (Kind.F, Kind.X, Kind.B, Kind.W):
            return before + cost(action)
        if action.kind not in senders:
            return before
        kind, step = senders[action.kind]
        sender = plan.actions[stage + step].index(Action(kind, stage + step, 0, action.microbatch))
        return max(before, end(stage + step, sender) + transfer)

    return max(end(stage, index) for stage, actions in enumerate(plan.actions) for index in range(len(actions)))


def test_makespan_is_the_critical_path_of_a_thousand_random_plans() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        num_stages = rng.randint(1, 5)
        plan = build_plan(
            rng.choice(sorted(SCHEDULES)),
            num_stages=num_stages,
            num_microbatches=rng.randint(1, 8),
            has_exits=[rng.random() < 0.5 for _ in range(num_stages - 1)] + [True],
        )
        durations = {action: rng.randint(0, 9) for actions in plan.actions for action in actions}
        transfer = rng.choice([0, rng.randint(1, 5)])
        makespan = simulate(plan, durations.__getitem__, transfer=transfer).makespan
        assert makespan == critical_path(plan, durations.__getitem__, transfer)


def test_spans_by_hand() -> None:
    spans = [(str(span.action), span.start, span.end) for span in two_stages().spans[0]]
    assert spans == [
        ("F0@0", 0, 1),
        ("F1@0", 1, 2),
        ("X0@0", 2, 3),
        ("X1@0", 3, 4),
        ("B0@0", 5, 7),
        ("B1@0", 9, 11),
    ]


def test_figures_by_hand() -> None:
    timeline = two_stages()
    assert timeline.makespan == 11
    assert timeline.busy == (8, 8)
    assert timeline.bubble_fraction == pytest.approx(6 / 22)
    assert timeline.peak_activations == (2, 1)


def test_what_runs_only_forward_is_not_held() -> None:
    work = [(Kind.F, 0), (Kind.F, 2), (Kind.F, 1), (Kind.B, 0), (Kind.B, 1)]
    spans = tuple(Span(Action(kind, 0, 0, i), start, start + 1) for start, (kind, i) in enumerate(work))
    assert Timeline("filled-1f1b", (spans, spans[:2] + spans[3:4])).peak_activations == (2, 1)
    assert Timeline("forward-only", (spans[:3],)).peak_activations == (1,)


def test_a_transfer_delays_the_receiver_and_not_the_sender() -> None:
    plan = build_plan("forward-only", num_stages=2, num_microbatches=2, has_exits=[False, True])
    timeline = simulate(plan, StageCosts((1, 1), (0, 0), (0, 0)), transfer=5)
    assert [(span.start, span.end) for span in timeline.spans[0]] == [(0, 1), (1, 2)]
    assert [span.start for span in timeline.spans[1] if span.action.kind is Kind.F] == [6, 7]


def test_costs_of_chunks_are_in_the_models_order() -> None:
    plan = build_plan("forward-only", num_stages=2, num_chunks=2, num_microbatches=1, has_exits=[True] * 4)
    timeline = simulate(plan, ChunkCosts(((1, 3), (2, 4)), ((0, 0), (0, 5)), ((0, 0), (0, 0))))
    durations = {str(span.action): span.end - span.start for lane in timeline.spans for span in lane}
    forwards = {"F0@0": 1, "F0@1": 2, "F0.1@0": 3, "F0.1@1": 4}
    assert durations == forwards | {"X0@0": 0, "X0@1": 0, "X0.1@0": 0, "X0.1@1": 5}


@pytest.mark.parametrize("duration", [-1, float("nan")])
def test_impossible_durations_are_refused(duration: float) -> None:
    plan = build_plan("1f1b", num_stages=1, num_microbatches=1, has_exits=[True])
    with pytest.raises(ValueError, match="F0@0 takes"):
        simulate(plan, lambda action: duration)
    with pytest.raises(ValueError, match="a transfer takes"):
        simulate(plan, lambda action: 1, transfer=duration)


def test_drawing() -> None:
    assert draw(two_stages(), width=24) == (
        "1f1b: makespan 11, bubble 27.3% (a forward, A backward, + exits, . idle)\n"
        "0 aabb++++..AAAA....BBBB\n"
        "1 ..aa++AAAAbb++BBBB...."
    )


def test_drawing_of_validation() -> None:
    assert draw(two_stages("forward-only"), width=12).splitlines()[1:] == ["0 aa++bb++..", "1 ..aa++bb++"]


def test_drawing_of_fills() -> None:
    """The first turns on stage 0 in the warm-up; the second leaves only its F on stage 0, in the cool-down."""
    plan = build_plan(
        "filled-1f1b",
        num_stages=3,
        num_microbatches=3,
        has_exits=[True, False, True],
        fills=[Fill("warmup", 0), Fill("cooldown", 2)],
    )
    timeline = simulate(plan, StageCosts((1, 1, 1), (0, 0, 0), (2, 2, 2)))
    assert draw(timeline, width=17) == (
        "filled-1f1b: makespan 15, bubble 22.2% (a forward, A backward, + exits, . idle, 0-9 fills)\n"
        "0 ab000c.AA1BB.CC\n"
        "1 .ab..AAcBB1CC..\n"
        "2 ..aAAbBBcCC111."
    )
    assert timeline.peak_activations == (3, 2, 1)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_drawing_keeps_its_width(width: int) -> None:
    plan = build_plan("1f1b", num_stages=12, num_microbatches=40, has_exits=[True] * 12)
    title, *lanes = draw(simulate(plan, lambda action: 0.37), width=width).splitlines()
    assert len(title) <= 80
    assert {len(lane) for lane in lanes} == {width}
    assert (lanes[0][:3], lanes[11][:3]) == (" 0 ", "11 ")


def test_drawing_of_no_time_and_of_no_room() -> None:
    plan = build_plan("1f1b", num_stages=1, num_microbatches=1, has_exits=[True])
    timeline = simulate(plan, lambda action: 0)
    assert timeline.bubble_fraction == 0
    assert draw(timeline, width=5).splitlines()[1] == "0 ..."
    with pytest.raises(ValueError, match="a width of 2 leaves no room"):
        draw(timeline, width=2)


def test_large_plans_are_simulated_in_a_time_linear_in_their_actions() -> None:
    def seconds(num_stages: int, num_microbatches: int) -> float:
        plan = build_plan(
            "1f1b", num_stages=num_stages, num_microbatches=num_microbatches, has_exits=[True] * num_stages
        )
        start = time.process_time()
        simulate(plan, lambda action: 1)
        return time.process_time() - start

    assert seconds(32, 128) < 6 * 8 * seconds(8, 64)  # 8 times the actions; far from 64 times the time
