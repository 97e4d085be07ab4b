"""What is launched: one depth, within limits, and nobody is left behind for ever."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.config import SchedulingParams
from megatron_ee.inference.scheduling.costs import estimated_costs
from megatron_ee.inference.scheduling.fronts import Front
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.strategies.named import make_planner

DEPTHS = (0, 2, 5, 8)
STRATEGIES = ["lockstep", "compaction", "rebatch"]


def planner_of(
    strategy: str, *, launch_rows: int = 4, residents: int = 8, max_wait: int = 5, chunk: int = 16
) -> Planner:
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": launch_rows, "max_wait": max_wait})
    costs = estimated_costs([1.0] * 8, DEPTHS[1:-1], row=0.05)
    return make_planner(params, costs, DEPTHS, residents=residents, prefill_chunk=chunk)


@st.composite
def fronts_of(draw: st.DrawFn) -> list[Front]:
    slots = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True))
    fronts = []
    for slot in slots:
        at = draw(st.sampled_from(DEPTHS[:-1]))
        stop = draw(st.sampled_from([depth for depth in DEPTHS if depth > at]))
        rows = draw(st.sampled_from([1, 1, 1, 2, 7, 16]))
        drafts = at == 0 and rows == 1 and draw(st.booleans())
        fronts.append(Front(slot, at, rows, stop, draw(st.integers(0, 9)), drafts))
    return fronts


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(fronts=fronts_of(), launch=st.integers(10, 40))
@settings(max_examples=150)
def test_a_plan_is_of_one_depth_and_within_limits(strategy: str, fronts: list[Front], launch: int) -> None:
    plan = planner_of(strategy).plan(fronts, launch, [], lambda *_: 0)
    taken = [front for front in fronts if front.slot in plan.counts]
    assert taken and {front.at for front in taken} == {plan.start}
    assert plan.stop == min(front.stop for front in taken)
    assert plan.counts == {front.slot: front.rows for front in taken}
    assert list(plan.counts) == sorted(plan.counts), "neighbours in the cache are neighbours in a launch"
    prompts = [front.rows for front in taken if front.at == 0 and front.rows > 1]
    assert len(taken) - len(prompts) <= 4
    assert sum(prompts) <= 16
    assert not plan.fills


@pytest.mark.parametrize("strategy", ["compaction", "rebatch"])
@given(fronts=fronts_of(), ready=st.dictionaries(st.integers(0, 40), st.integers(0, 5)))
@settings(max_examples=100)
def test_fills_take_what_room_there_is(strategy: str, fronts: list[Front], ready: dict[int, int]) -> None:
    plan = planner_of(strategy).plan(fronts, 10, list(ready), lambda slot, start, stop: ready[slot])
    on_their_way = {front.slot for front in fronts if front.at}
    assert not plan.fills.keys() & (plan.counts.keys() | on_their_way)
    assert all(0 < count <= ready[slot] for slot, count in plan.fills.items())
    assert sum(plan.fills.values()) <= max(0, 4 - len(plan.counts))
    assert plan.start > 0 or not plan.fills, "tokens enter; nothing waits there"


def test_lockstep_carries_all_that_has_left() -> None:
    front = Front(0, 2, 1, 5, 3)
    plan = planner_of("lockstep").plan([front, Front(1, 0, 1, 2, 4)], 10, [1, 2], lambda slot, *_: 3 * slot)
    assert plan.counts == {0: 1}
    assert plan.fills == {1: 3, 2: 6}


def test_drafts_come_before_what_is_on_its_way() -> None:
    drafting, waiting, new = Front(0, 0, 1, 2, 5, drafts=True), Front(1, 2, 3, 8, 2), Front(2, 0, 1, 2, 1)
    for strategy in ("lockstep", "compaction"):
        assert planner_of(strategy).plan([waiting, drafting, new], 10, [], lambda *_: 0).counts == {0: 1}
        assert planner_of(strategy).plan([waiting, new], 10, [], lambda *_: 0).counts == {1: 3}


def test_rows_that_have_waited_go_on_whoever_goes_with_them() -> None:
    fronts = [Front(0, 5, 1, 8, 4), *(Front(slot, 0, 1, 2, 9) for slot in range(1, 9))]
    rebatch = planner_of("rebatch", residents=100)
    assert rebatch.plan(fronts, 9, [], lambda *_: 0).start == 0
    assert rebatch.plan(fronts, 10, [], lambda *_: 0).counts == {0: 1}, "longer than 5 launches"


def test_a_queue_that_fills_a_launch_runs() -> None:
    deep: Sequence[Front] = [Front(slot, 2, 1, 5, 9) for slot in range(4)]
    new = [Front(slot, 0, 1, 2, 9) for slot in range(4, 12)]
    assert planner_of("rebatch").plan([*deep, *new], 10, [], lambda *_: 0).start == 2
    assert planner_of("rebatch").plan([*deep[:3], *new], 10, [], lambda *_: 0).start == 0


@pytest.mark.parametrize("all_went_deeper", [False, True])
def test_one_token_begins_alone_only_where_few_went_deeper_before(all_went_deeper: bool) -> None:
    rebatch = planner_of("rebatch")

    def depth_of_the_next(counts: dict[int, int], launch: int) -> int:
        fronts = [
            Front(depth + slot, depth, 1, DEPTHS[DEPTHS.index(depth) + 1], launch, owes=False)
            for depth, count in counts.items()
            for slot in range(0, 100 * count, 100)
        ]
        return rebatch.plan(fronts, launch, [], lambda *_: 0).start

    for launch in range(20):
        for depth in (0, 2, 5) if all_went_deeper else (0,):
            assert depth_of_the_next({depth: 4}, launch) == depth
    assert depth_of_the_next({0: 4}, 30) == 0
    assert depth_of_the_next({2: 3, 5: 1, 0: 1}, 30) == (2 if all_went_deeper else 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_waits_where_a_stage_begins_is_no_filling_if_it_is_on_its_way(strategy: str) -> None:
    """Its newest row waits there, too."""
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": 1})
    costs = estimated_costs([1.0] * 8, DEPTHS[1:-1], row=0.05)
    planner = make_planner(params, costs, DEPTHS[1:], residents=8, prefill_chunk=16)
    plan = planner.plan([Front(0, 2, 1, 5, 0), Front(1, 2, 2, 5, 1)], 3, [0, 1], lambda *_: 2)
    assert (plan.counts, plan.fills) == ({0: 1}, {})
