"""Reports by hand, beside numpy's percentiles, and bounds that no simulated run exceeds."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.scheduling.test_planner import STRATEGIES
from inference.scheduling.test_simulate import DEEPER, FLAT, run

from megatron_ee.inference.scheduling.bounds import gain_of_rebatching, most_tokens_per_second, reach_of
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.fronts import LaunchPlan
from megatron_ee.inference.scheduling.report import Percentiles, as_json, report_of, report_of_run
from megatron_ee.inference.scheduling.report_table import Unit, table
from megatron_ee.inference.scheduling.slots import SlotCounter


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
@settings(max_examples=60)
def test_percentiles_are_numpys(values: list[float]) -> None:
    assert Percentiles.of(values) == pytest.approx(tuple(np.percentile(values, (50, 95, 99))), rel=1e-9, abs=1e-6)


def test_a_report_by_hand() -> None:
    report = report_of([10.0, 12.0, 11.0], [[11.0, 13.0], [14.0], []], {}, forced=2)
    assert (report.requests, report.tokens, report.seconds, report.forced) == (3, 3, 4.0, 2)
    assert report.tokens_per_second == 0.75
    assert (report.first_token.p50, report.token.p99, report.request.p50) == (1.5, 2.0, 2.5)


def test_slots_by_hand() -> None:
    counter = SlotCounter(4)
    counter.count(LaunchPlan(2, 5, {0: 3, 1: 1}, {2: 1}))
    counter.count(LaunchPlan(0, 2, {0: 1}))
    counter.count(LaunchPlan(2, 5, dict.fromkeys(range(5), 1)))
    assert list(counter.use) == [(0, 2), (2, 5)]
    use = counter.use[2, 5]
    assert (use.launches, use.real, use.filled, use.taken, use.empty) == (2, 9, 1, 7, 1)
    assert (use.rows_a_launch, use.shares) == (5.0, (7 / 9, 1 / 9, 1 / 9))
    assert counter.use[0, 2].shares == (0.25, 0.0, 0.75)


def test_an_empty_load_is_served_in_no_time() -> None:
    empty = run("rebatch", 0, 1)
    assert (empty.tokens_per_second, empty.seconds) == (0.0, 0.0)
    report = report_of_run(empty)
    assert (report.tokens_per_second, report.token, report.use) == (0.0, (None, None, None), {})
    assert json.loads(json.dumps(as_json(report)))["first_token"] == {"p50": None, "p95": None, "p99": None}
    assert table({"lockstep": report, "rebatch": report}, bound=3.0)


def test_a_table_has_a_column_for_each_with_its_ratio_to_the_first() -> None:
    fast, slow = (report_of([0.0], [[step, 3 * step]], {}) for step in (1.0, 2.0))
    lines = table({"lockstep": slow, "rebatch": fast}, unit=Unit("s"), bound=1.0)
    assert lines[0].split() == ["lockstep", "rebatch"]
    assert lines[1].split() == ["tokens/s", "0.3333", "0.6667", "2.00x"]
    assert lines[2].split()[-2:] == ["33.3%", "66.7%"]
    assert lines[3].split() == ["first", "token", "p50", "(s)", "2", "1", "0.50x"]
    assert len(set(map(len, lines[:2]))) == 1


ROWS = SegmentCosts(dict.fromkeys(((0, 4), (4, 8)), ((1, 1.0), (101, 6.0))), {4: ((1, 0.1), (11, 0.2))})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", ["recompute", "fill", "propagate"])
@pytest.mark.parametrize("costs", [FLAT, ROWS], ids=["flat", "rows"])
def test_no_strategy_exceeds_the_bound(strategy: str, policy: str, costs: SegmentCosts) -> None:
    """What texts owe at their end is never made up for: a percent or two more than the bound may come of it."""
    served = run(strategy, 16, 8, costs=costs, policy=policy)
    reach = reach_of([depth for of in served.requests for depth in of.depths], [4], 8)
    bound = most_tokens_per_second(reach, costs, launch_rows=8, kv_policy=policy)  # type: ignore[arg-type]
    assert served.tokens_per_second < 1.02 * bound
    if costs is FLAT:
        assert bound == pytest.approx(8 / (1 + reach[4, 8]))


def test_bounds_are_reached_where_they_should_be() -> None:
    served = run("rebatch", 32, 8, policy="propagate", costs=ROWS)
    reach = reach_of([depth for of in served.requests for depth in of.depths], [4], 8)
    bound = most_tokens_per_second(reach, ROWS, launch_rows=8, kv_policy="propagate")
    assert served.tokens_per_second > 0.95 * bound
    assert gain_of_rebatching(DEEPER, 1.0, 1.0) == pytest.approx(1.133, abs=1e-3)
    assert gain_of_rebatching(1.0, 1.0, 3.0) == 1.0
    assert gain_of_rebatching(0.0, 1.0, 3.0) == 4.0


def test_exact_policies_owe_what_propagating_does_not() -> None:
    reach = {(0, 4): 1.0, (4, 8): 0.5}
    bounds = [most_tokens_per_second(reach, ROWS, launch_rows=11, kv_policy=of) for of in ("recompute", "propagate")]
    assert bounds == pytest.approx([11 / (1.5 + 0.2 + 0.5 * (1 + 21 / 20)), 11 / (1.5 + 0.2 + 0.5 * 1.5)])
    more = SegmentCosts(ROWS.segments, stores={(4, 8): ((1, 0.1), (11, 0.3))}, step=0.05, token=0.01)
    bound = most_tokens_per_second(reach, more, launch_rows=11, kv_policy="propagate", prompt_rows=1.0)
    assert bound == pytest.approx(11 / (0.11 + 2.05 + 0.05 + 0.5 * (1 + 32 / 20 + 0.05) + 0.5 * 0.3))


def test_the_simulator_counts_the_slots_that_it_fills() -> None:
    served = run("compaction", 16, 16)
    use = served.use[0, 4]
    assert use.taken + use.empty == 16 * use.launches
    assert served.use[4, 8].shares[0] == pytest.approx(DEEPER, abs=0.05)
