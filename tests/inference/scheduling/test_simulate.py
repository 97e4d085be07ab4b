"""The simulator against closed forms, and what holds for any load and strategy."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.scheduling.test_planner import STRATEGIES, planner_of

from megatron_ee.config import SchedulingParams
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.simulate import EngineSimulator, SimulatedRequest, SimulatedRun
from megatron_ee.inference.scheduling.strategies.named import make_planner

FLAT = SegmentCosts({(0, 4): ((1, 1.0), (2, 1.0)), (4, 8): ((1, 1.0), (2, 1.0))})  # memory-bound: rows cost nothing
DEEPER = 0.3
"""The share of tokens that go to full depth, of two equal segments."""


def run(
    strategy: str, residents: int, launch_rows: int, *, costs: SegmentCosts = FLAT, policy: str = "recompute"
) -> SimulatedRun:
    numbers = random.Random(0)
    requests = [
        SimulatedRequest(1, tuple(4 if numbers.random() >= DEEPER else 8 for _ in range(numbers.randint(30, 90))))
        for _ in range(8 * residents)
    ]
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": launch_rows, "max_wait": 10**6})
    planner = make_planner(params, costs, (0, 4, 8), residents=residents, prefill_chunk=512)
    simulator = EngineSimulator(planner, costs, [4], 8, residents=residents, kv_policy=policy)
    return simulator.run(requests)


def test_where_rows_cost_nothing_compaction_is_lockstep() -> None:
    speeds = [run(strategy, 16, 16).tokens_per_second for strategy in ("lockstep", "compaction")]
    assert speeds[1] == pytest.approx(speeds[0], rel=0.01)


@pytest.mark.parametrize("policy", ["recompute", "propagate"])
def test_rebatching_has_the_best_number_of_shallow_launches(policy: str) -> None:
    """max over t of [(1 - (1-q)^t) / q] (a1 + a2) / (t a1 + a2), 1.133 here at t = 2. Less where texts end, and a
    little more where t depends on how many have left."""
    best = max((1 - (1 - DEEPER) ** t) / DEEPER * 2 / (t + 1) for t in range(1, 9))
    gain = run("rebatch", 16, 16, policy=policy).tokens_per_second / run("lockstep", 16, 16).tokens_per_second
    assert best == pytest.approx(1.133, abs=1e-3)
    assert 0.97 * best < gain < 1.03 * best


def test_with_more_sequences_than_a_launch_takes_it_reaches_the_ideal() -> None:
    """(a1 + a2) / (a1 + q a2)."""
    ideal = 2 / (1 + DEEPER)
    gain = run("rebatch", 64, 16).tokens_per_second / run("lockstep", 64, 16).tokens_per_second
    assert 0.97 * ideal < gain < 1.01 * ideal


@pytest.mark.parametrize("policy", ["recompute", "fill", "propagate"])
@pytest.mark.parametrize("row", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("residents", [4, 16])
def test_rebatching_is_never_much_slower_than_lockstep(policy: str, row: float, residents: int) -> None:
    curve = ((1.0, 1.0 + row), (100.0, 1.0 + 100 * row))
    costs = SegmentCosts({(0, 4): curve, (4, 8): curve})
    speeds = [
        run(strategy, residents, 16, costs=costs, policy=policy).tokens_per_second
        for strategy in ("lockstep", "rebatch")
    ]
    assert speeds[1] > 0.98 * speeds[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(data=st.data())
@settings(max_examples=60)
def test_every_request_ends_with_its_own_depths_and_nobody_waits_too_long(strategy: str, data: st.DataObject) -> None:
    request = st.builds(
        SimulatedRequest,
        st.integers(1, 40),
        st.lists(st.sampled_from([2, 5, 8]), min_size=1, max_size=12).map(tuple),
        st.sampled_from([0.0, 0.0, 3.0, 50.0]),
    )
    requests = data.draw(st.lists(request, min_size=1, max_size=12))
    residents, launch_rows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    policy = data.draw(st.sampled_from(["recompute", "fill", "propagate"]))
    costs = SegmentCosts(dict.fromkeys(((0, 2), (2, 5), (5, 8)), ((1, 1.0), (9, 2.0))))
    planner = planner_of(strategy, launch_rows=launch_rows, residents=residents)
    simulator = EngineSimulator(
        planner, costs, [2, 5], 8, residents=residents, prefill_chunk=16, kv_policy=policy, max_pending=3
    )
    served = simulator.run(requests)
    assert [len(times) for times in served.times] == [len(of.depths) for of in requests]
    assert all(
        times == sorted(times) and times[0] > of.arrival for times, of in zip(served.times, requests, strict=True)
    )
    assert served.forced == 0
    rows = sum(use.real for (start, _), use in served.use.items() if start == 0)
    assert rows == sum(of.prompt + len(of.depths) - 1 for of in requests), "every token enters once"
