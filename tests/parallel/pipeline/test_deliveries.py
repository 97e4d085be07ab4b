"""When a stage may let go of what it sent."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.parallel.pipeline.deliveries import SENDS, deliveries
from megatron_ee.parallel.pipeline.plan import Action, Fill, Plan
from megatron_ee.parallel.pipeline.schedules import SCHEDULES, build_plan
from megatron_ee.parallel.pipeline.validity import receive_of


def _fills(num_stages: int) -> list[Fill]:
    """Two of each kind, where there is a place for them."""
    turns, lasts = range(num_stages - 1), range(1, num_stages)
    return [*(Fill("warmup", s) for s in [*turns[-1:], *turns[:1]]), *(Fill("cooldown", s) for s in lasts[:2])]


def _plan(schedule: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Plan:
    return build_plan(
        schedule,
        num_stages=num_stages,
        num_chunks=num_chunks,
        num_microbatches=num_microbatches,
        has_exits=[True] * num_stages * num_chunks,
        fills=_fills(num_stages) if schedule == "filled-1f1b" else (),
    )


def _most_under_way(plan: Plan, stage: int) -> int:
    safe, under_way, most = deliveries(plan, stage), set(), 0
    for action in plan.actions[stage]:
        if action.kind in SENDS:
            under_way.add(action)
            most = max(most, len(under_way))
        under_way -= set(safe.get(action, ()))
    return most


@pytest.mark.parametrize(
    ("schedule", "most"), [("1f1b", 9), ("filled-1f1b", 9), ("interleaved", 18), ("forward-only", 3)]
)
def test_what_is_held_does_not_grow_with_the_step(schedule: str, most: int) -> None:
    for num_microbatches in (16, 64, 256):
        plan = _plan(schedule, 4, num_microbatches, 2 if schedule == "interleaved" else 1)
        assert max(_most_under_way(plan, stage) for stage in range(4)) <= most


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 5), st.integers(1, 12), st.integers(2, 3))
@settings(max_examples=60)
def test_a_finished_send_was_received_before_the_message_that_proves_it(
    schedule: str, num_stages: int, num_microbatches: int, num_chunks: int
) -> None:
    if schedule == "interleaved":
        plan = _plan(schedule, num_stages, -(-num_microbatches // num_stages) * num_stages, num_chunks)
    else:
        plan = _plan(schedule, num_stages, num_microbatches)
    for stage in range(num_stages):
        finished: list[Action] = []
        own = {action: index for index, action in enumerate(plan.actions[stage])}
        for action, sends in deliveries(plan, stage).items():
            finished += sends
            for send in sends:
                assert own[send] < own[action], "nothing is finished before it is sent"
                peer = receive_of(plan, send).stage
                there = plan.actions[peer]
                proofs = [
                    index for index, sent in enumerate(there) if sent.kind in SENDS and receive_of(plan, sent) == action
                ]
                assert not proofs or there.index(receive_of(plan, send)) < proofs[0]
        assert len(finished) == len(set(finished))
