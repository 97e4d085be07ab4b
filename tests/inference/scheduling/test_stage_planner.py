"""What stages run next, and the clock by which all of them know what the others do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import SchedulingParams
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.fronts import Front, LaunchPlan
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.scheduling.strategies.named import make_stage_planner
from megatron_ee.inference.stages import Stages, depths_of
from megatron_ee.inference.timetable import Coming, Timetable

STAGES = Stages((2, 4, 8))
READS = ((1.0, 1.0), (2.0, 1.0))
"""Of a launch, whatever is in it."""
ROWS = ((1.0, 1.0), (2.0, 2.0))


def _planner(curve: tuple[tuple[float, float], ...] = READS, **params: object) -> StagePlanner:
    costs = SegmentCosts({(layer, layer + 1): curve for layer in range(8)})
    settings = SchedulingParams.model_validate({"strategy": "compaction", **params})
    depths = depths_of((2, 4), STAGES)
    return make_stage_planner(settings, costs, STAGES, depths, residents=16, prefill_chunk=8)


def _new(count: int) -> list[Front]:
    return [Front(slot, 0, 1, 2, 0) for slot in range(count)]


def _plan(planner: StagePlanner, stage: int, fronts: list[Front], **more: object) -> LaunchPlan | None:
    asked: dict = {"fillers": [], "ready": lambda *_: 0, "residents": 12, "coming": None, **more}
    return planner.plan(stage, fronts, 0, asked.pop("fillers"), asked.pop("ready"), **asked)


def _begun(planner: StagePlanner) -> int:
    plan = _plan(planner, 0, _new(12))
    assert plan is not None
    return len(plan.counts)


def test_as_many_begin_as_keep_all_spread() -> None:
    planner = _planner()
    assert _begun(planner) == 3, "the first stage has a quarter of the layers"
    for _ in range(4):
        planner.saw(2)
    assert _begun(planner) == 12, "all leave after it"
    for _ in range(4):
        planner.saw(8)
    assert _begun(planner) == 11, "12 / 2.5, and as many more, which cost nothing, as depths differ"
    by_rows = _planner(ROWS)
    for depth in (2, 2, 2, 2, 8, 8, 8, 8):
        by_rows.saw(depth)
    assert _begun(by_rows) == 5, "where one more costs as much as the others"
    assert _begun(_planner(launch_rows=2)) == 2, "unless the config says how many"


def test_prompts_are_not_held_back() -> None:
    fronts = [Front(0, 0, 5, 8, 0), Front(1, 0, 3, 8, 0), *_new(12)[2:]]
    plan = _plan(_planner(), 0, fronts)
    assert plan is not None and {0, 1} <= plan.counts.keys() and len(plan.counts) == 5


def test_a_stage_runs_no_further_than_it_has_layers() -> None:
    plan = _plan(_planner(), 1, [Front(3, 2, 1, 4, 0), Front(4, 4, 1, 8, 0)])
    assert plan == LaunchPlan(2, 4, {3: 1})


@pytest.mark.parametrize(
    ("coming", "curve", "fills"),
    [
        (None, READS, True),
        (Coming(2.0, 1), READS, True),
        (Coming(1.0, 1), READS, False),  # it would come too late to somebody whom its rows cost nothing
        (Coming(1.0, 1), ROWS, True),  # they would cost as much then
    ],
)
def test_a_stage_without_tokens_fills_in_what_is_done_in_time(
    coming: Coming | None, curve: tuple[tuple[float, float], ...], fills: bool
) -> None:
    def ready(slot: int, start: int, stop: int) -> int:
        return 1 if (slot, start, stop) == (5, 2, 4) else 0

    plan = _plan(_planner(curve), 1, [], fillers=[5, 6], ready=ready, coming=coming)
    assert plan == (LaunchPlan(2, 4, {}, {5: 1}) if fills else None)
    assert _plan(_planner(curve), 0, [], fillers=[5, 6], ready=ready) is None, "nothing waits in front of the first"


def test_what_may_not_go_on_runs_at_once_and_with_everybody() -> None:
    def ready(slot: int, start: int, stop: int) -> int:
        return 9 if (slot, start, stop) == (5, 2, 4) else 0

    late = Coming(0.1, 4)
    assert _plan(_planner(), 1, [], ready=ready, coming=late, urgent=[5]) == LaunchPlan(2, 4, {}, {5: 9})
    plan = _plan(_planner(), 1, [Front(3, 2, 1, 4, 0)], ready=ready, urgent=[5])
    assert plan == LaunchPlan(2, 4, {3: 1}, {5: 9})


@given(st.data())
def test_launches_end_in_order_and_none_is_lost(data: st.DataObject) -> None:
    timetable: Timetable[int] = Timetable(4)
    ends: dict[int, float] = {}
    ended: list[int] = []
    for number in range(data.draw(st.integers(1, 40))):
        free = timetable.free
        if not free or (ends.keys() - ended and data.draw(st.booleans())):
            before, now = timetable.now, timetable.end()
            assert now and timetable.now >= before
            assert max(ends[flight] for flight in now) == timetable.now
            ended += now
            assert all(ends[flight] >= timetable.now for flight in ends.keys() - set(ended))
        else:
            cost = data.draw(st.floats(0.01, 10))
            ends[number] = timetable.now + cost
            timetable.begin(data.draw(st.sampled_from(free)), number, cost, tokens=1)
    while flights := timetable.end():
        ended += flights
    assert sorted(ended) == sorted(ends) and timetable.free == [0, 1, 2, 3]


def test_what_ends_nearly_together_ends_together_the_deepest_first() -> None:
    timetable: Timetable[str] = Timetable(3)
    timetable.begin(0, "shallow", 10.0, tokens=2)
    timetable.begin(2, "deep", 10.9, tokens=1)
    timetable.begin(1, "later", 11.5, tokens=3)
    assert timetable.coming(0) == Coming(10.0, 2) and timetable.coming(2) == Coming(11.5, 3)
    assert timetable.end() == ["deep", "shallow"] and timetable.now == 10.9
    assert timetable.free == [0, 2] and timetable.flights == ["later"]
    assert timetable.coming(1) is None
