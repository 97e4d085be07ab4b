"""Simulated pipelines against closed forms, and what holds for any load on any stages."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.config import KvPolicy, SchedulingParams
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.simulate import EngineSimulator, SimulatedRequest, SimulatedRun
from megatron_ee.inference.scheduling.strategies.named import make_stage_planner
from megatron_ee.inference.stages import Stages

EQUAL, SURVIVAL = (4, 8, 12, 16), (2, 5, 9, 16)
EXITS = (4, 8, 12)
SHARES = {4: 0.4, 8: 0.2, 12: 0.1, 16: 0.3}
"""Of tokens, by the layers that they run."""
MEAN_STAGES = 0.4 * 1 + 0.2 * 2 + 0.1 * 3 + 0.3 * 4
POLICIES: tuple[KvPolicy, ...] = ("fill", "recompute", "propagate")
FLAT = SegmentCosts({(0, 16): ((1, 16.0), (2, 16.0))})  # rows cost nothing
BY_ROW = SegmentCosts({(0, 16): ((1, 16.0), (2, 32.0))})  # rows cost all


def run(
    stops: Sequence[int],
    requests: Sequence[SimulatedRequest],
    residents: int,
    *,
    costs: SegmentCosts = FLAT,
    exits: Sequence[int] = EXITS,
    policy: KvPolicy = "propagate",
    strategy: str = "compaction",
    recorder: Recorder | None = None,
    prefill_chunk: int = 512,
    max_pending: int = 256,
    launch_rows: int | None = None,
) -> SimulatedRun:
    stages = Stages(tuple(stops))
    depths = tuple(sorted({0, *exits, *stops}))
    own = costs.cut_at(depths)
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": launch_rows})
    planner = make_stage_planner(params, own, stages, depths, residents=residents, prefill_chunk=prefill_chunk)
    simulator = EngineSimulator(
        planner,
        own,
        exits,
        stops[-1],
        residents=residents,
        kv_policy=policy,
        recorder=recorder,
        prefill_chunk=prefill_chunk,
        max_pending=max_pending,
    )
    return simulator.run(requests)


def load(count: int, *, exiting: bool = True, tokens: int = 60) -> list[SimulatedRequest]:
    numbers = random.Random(0)
    shares = SHARES if exiting else {16: 1.0}
    exits = None if exiting else ()
    drawn = [tuple(numbers.choices([*shares], [*shares.values()], k=tokens)) for _ in range(count)]
    return [SimulatedRequest(1, depths, exits=exits) for depths in drawn]


def test_one_text_at_full_depth_says_a_token_each_time_through_all_stages() -> None:
    (times,) = run(EQUAL, load(1, exiting=False), 1).times
    assert times == [16.0 * token for token in range(1, 61)]


def test_one_text_comes_back_from_where_its_tokens_leave() -> None:
    """E[s] launches a token instead of P."""
    requests = load(1, tokens=2000)
    served = run(EQUAL, requests, 1)
    assert served.seconds == sum(requests[0].depths)
    gain = served.tokens_per_second / run(EQUAL, load(1, exiting=False), 1).tokens_per_second
    assert gain == pytest.approx(4 / MEAN_STAGES, rel=0.03)
    shares = [sum(depth > start for depth in requests[0].depths) / 2000 for start in (0, 4, 8, 12)]
    assert [of.real for of in served.stages] == pytest.approx([4 * share / (served.seconds / 2000) for share in shares])
    assert all(of.filled == 0 for of in served.stages), "nothing is left to make up for"


def test_as_many_texts_as_stages_say_a_token_each_launch() -> None:
    served = run(EQUAL, load(4, exiting=False), 4)
    said = sorted(time for times in served.times for time in times)
    assert said == [16.0 + 4 * token for token in range(240)]
    assert [of.real for of in served.stages] == pytest.approx([240 / 243] * 4)


def test_where_rows_cost_all_equal_stages_gain_nothing_with_many_texts() -> None:
    """The first stage sees every token."""
    gain = _speed(EQUAL, 32) / _speed(EQUAL, 32, exiting=False)
    assert 0.96 < gain <= 1.005


def test_the_worked_example_of_survival() -> None:
    """16 layers, of which the stages run 2, 3, 4 and 7: 1.54 times as fast as four each."""
    reach = [sum(share for depth, share in SHARES.items() if depth > layer) for layer in range(16)]
    slowest = max(sum(reach[start:stop]) for start, stop in pairwise((0, *SURVIVAL)))
    assert 4 / slowest == pytest.approx(1.54, abs=0.005)
    gain = _speed(SURVIVAL, 48) / _speed(EQUAL, 48)
    assert 0.96 * 4 / slowest < gain < 1.01 * 4 / slowest


def _speed(stops: Sequence[int], residents: int, *, exiting: bool = True) -> float:
    requests = load(3 * residents, exiting=exiting)
    return run(stops, requests, residents, costs=BY_ROW).tokens_per_second


def test_idle_stages_fill_in_what_tokens_have_skipped() -> None:
    """With one text, what waits of it never makes its deeper tokens slower, while rows that they take along do."""
    requests = load(1, tokens=300)
    filling, carrying, ideal = (run(EQUAL, requests, 1, costs=BY_ROW, policy=policy) for policy in POLICIES)
    assert ideal.seconds <= filling.seconds < carrying.seconds
    assert sum(of.filled for of in filling.stages) > 0.1
    assert sum(of.filled for of in carrying.stages) == 0


def test_every_process_plans_each_launch() -> None:
    """P steps a launch time, and 4 layers."""
    served = run(EQUAL, load(4, exiting=False, tokens=400), 4, costs=replace(FLAT, step=0.25))
    assert served.seconds / 1600 == pytest.approx(4 + 4 * 0.25, rel=0.01)


def test_measured_costs_are_the_time_and_estimates_the_order() -> None:
    """The planner's clock does not know of heads, steps and tokens here."""
    recorder, slow = Recorder(), replace(FLAT, heads={16: ((1, 3.0),)}, token=2.0)
    run(EQUAL, load(1, exiting=False, tokens=3), 1, costs=FLAT, recorder=recorder)
    assert [of.virtual for of in recorder.record.launches] == [(4.0 * at, 4.0 * at + 4) for at in range(12)]
    assert [of.seconds for of in recorder.record.launches] == [of.virtual for of in recorder.record.launches]
    served = run(EQUAL, load(1, exiting=False, tokens=3), 1, costs=slow)
    assert served.times == [[21.0, 42.0, 63.0]]


@pytest.mark.parametrize("strategy", ["lockstep", "compaction", "rebatch"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_token_is_said_once_and_no_stage_does_two_things(strategy: str, data: st.DataObject) -> None:
    request = st.builds(
        SimulatedRequest,
        st.integers(1, 20),
        st.lists(st.sampled_from([2, 5, 8]), min_size=1, max_size=10).map(tuple),
        st.sampled_from([0.0, 0.0, 3.0, 500.0]),
    )
    requests = data.draw(st.lists(request, min_size=1, max_size=9))
    number = st.floats(0.1, 9.0)
    segments = {of: ((1, cost := data.draw(number)), (9, cost + data.draw(number))) for of in ((0, 2), (2, 5), (5, 8))}
    recorder = Recorder()
    served = run(
        data.draw(st.sampled_from([(2, 8), (3, 8), (4, 8), (2, 5, 8), (3, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8)])),
        requests,
        residents=data.draw(st.integers(1, 6)),
        costs=SegmentCosts(segments, {8: ((1, data.draw(number)),)}, step=data.draw(st.sampled_from([0.0, 0.5]))),
        exits=(2, 5),
        policy=data.draw(st.sampled_from(POLICIES)),
        strategy=strategy,
        recorder=recorder,
        prefill_chunk=data.draw(st.sampled_from([1, 4, 64])),
        max_pending=data.draw(st.sampled_from([1, 3, 256])),
        launch_rows=data.draw(st.sampled_from([None, 1, 3])),
    )
    assert [len(times) for times in served.times] == [len(of.depths) for of in requests]
    assert all(
        times == sorted(times) and times[0] > of.arrival for times, of in zip(served.times, requests, strict=True)
    )
    rows = sum(use.real for (start, _), use in served.use.items() if start == 0)
    assert rows == sum(of.prompt + len(of.depths) - 1 for of in requests), "every token enters once"
    for clock in ("virtual", "seconds"):
        for lane in recorder.record.lanes(clock):
            assert all(one[1] <= other[0] for (_, one), (_, other) in pairwise(lane))
    assert all(0 <= of.real <= 1 and 0 <= of.filled <= 1 and of.real + of.filled <= 1 + 1e-9 for of in served.stages)


@pytest.mark.parametrize("residents", [2, 8])
def test_nobody_is_held_back_where_rows_cost_nothing(residents: int) -> None:
    """Equal launches keep step, and every token moves on with each: the longest text takes hardly longer than alone."""
    requests = load(residents, tokens=400)
    longest = max(sum(of.depths) for of in requests)
    assert run(EQUAL, requests, residents).seconds == pytest.approx(longest, rel=0.01)


@pytest.mark.parametrize("residents", [4, 8, 16])
def test_at_full_depth_all_stages_work_where_rows_cost_something(residents: int) -> None:
    costs = SegmentCosts({(0, 16): ((1, 16.0), (2, 20.0))})
    served = run(EQUAL, load(residents, exiting=False), residents, costs=costs)
    assert min(of.real for of in served.stages) > 0.95
    assert served.tokens_per_second == pytest.approx((residents / 4) / (4 + residents / 4 - 1), rel=0.02)
