"""The length of a step: design.md's table, the closed forms of schedules.py, and where they stop being exact."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import StageCosts, simulate

TRAINING = ["gpipe", "1f1b"]


@dataclass(frozen=True)
class Case:
    """A schedule with integer durations, so that lengths are compared exactly. X = 0: a stage without exits."""

    schedule: str
    num_microbatches: int
    costs: StageCosts

    @property
    def makespan(self) -> float:
        num_stages = len(self.costs.forward)
        plan = build_plan(
            self.schedule,
            num_stages=num_stages,
            num_microbatches=self.num_microbatches,
            has_exits=[*(duration > 0 for duration in self.costs.exit[:-1]), True],
        )
        return simulate(plan, self.costs).makespan

    def closed_form(self, microbatch: float) -> float:
        """One pass through the pipeline, and `microbatch` for each micro-batch but the first."""
        costs = self.costs
        return sum(costs.forward) + sum(costs.backward) + costs.exit[-1] + (self.num_microbatches - 1) * microbatch

    @property
    def slowest_stage(self) -> float:
        costs = self.costs
        return max(map(sum, zip(costs.forward, costs.exit, costs.backward, strict=True)))

    @property
    def exits_fit(self) -> bool:
        """Each X is no longer than the first wait for a gradient on its stage would be without it."""
        costs = self.costs
        waits = (sum(costs.forward[s + 1 :]) + sum(costs.backward[s + 1 :]) for s in range(len(costs.exit)))
        return all(x <= wait + costs.exit[-1] for x, wait in zip(costs.exit, waits, strict=True))


@st.composite
def cases(draw: st.DrawFn, *, schedules: list[str] = TRAINING, max_exit: int = 12, slowest_last: bool = False) -> Case:
    num_stages = draw(st.integers(1, 5))

    def durations(low: int, high: int) -> tuple[int, ...]:
        drawn = draw(st.lists(st.integers(low, high), min_size=num_stages, max_size=num_stages))
        return (*drawn[:-1], max(drawn)) if slowest_last else tuple(drawn)

    costs = StageCosts(durations(0, 6), durations(0, max_exit), durations(0, 6))
    return Case(draw(st.sampled_from(schedules)), draw(st.integers(1, 8)), costs)


@pytest.mark.parametrize(
    ("num_stages", "head", "fused", "ee_llm"),
    [(2, 0.5, 1.038, 1.026), (4, 0.5, 1.100, 1.067), (4, 1, 1.158, 1.105), (8, 1, 1.304, 1.203)],
)
def test_table_of_the_design(num_stages: int, head: float, fused: float, ee_llm: float) -> None:
    """Step time over the same pipeline without exits, F = 1, B = 2, a head that costs h forward and 2h backward.

    EE-LLM's order: forward of the head while waiting (X = h), backward of the head in B.
    """

    def makespan(forward: float, exits: float, backward: float, *, early: bool = True) -> float:
        costs = StageCosts((forward,) * num_stages, (exits,) * num_stages, (backward,) * num_stages)
        has_exits = [early] * (num_stages - 1) + [True]
        return simulate(
            build_plan("1f1b", num_stages=num_stages, num_microbatches=8, has_exits=has_exits), costs
        ).makespan

    without = makespan(1, 3 * head, 2, early=False)
    assert makespan(1, 3 * head, 2) / without == 1
    assert round(makespan(1 + head, 0, 2 + 2 * head) / without, 3) == fused
    assert round(makespan(1, head, 2 + 2 * head) / without, 3) == ee_llm


@given(cases(slowest_last=True))
@settings(max_examples=200)
def test_exact_where_the_last_stage_is_slowest_in_f_x_and_b(case: Case) -> None:
    """For any number of stages and of micro-batches, exits on any stages, and both schedules."""
    assert case.makespan == case.closed_form(case.slowest_stage)


@given(cases(slowest_last=True, max_exit=0))
@settings(max_examples=100)
def test_fused_is_exact_where_the_last_stage_is_slowest_in_f_and_b(case: Case) -> None:
    assert case.makespan == case.closed_form(case.slowest_stage)


@given(cases())
@settings(max_examples=300)
def test_bounds_for_all_costs(case: Case) -> None:
    costs = case.costs
    assert case.makespan >= case.closed_form(costs.forward[-1] + costs.exit[-1] + costs.backward[-1])
    if case.exits_fit:
        assert case.makespan <= case.closed_form(max(costs.forward) + max(costs.exit) + max(costs.backward))


@given(cases(), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=200)
def test_upper_bound_for_equal_layers_and_exits_anywhere(case: Case, forward: int, backward: int) -> None:
    """With F and B equal on all stages the bound is (M-1) max(F+B+X): exact where no exits cost more than the last."""
    num_stages = len(case.costs.exit)
    case = Case(
        case.schedule,
        case.num_microbatches,
        StageCosts((forward,) * num_stages, case.costs.exit, (backward,) * num_stages),
    )
    if case.exits_fit:
        assert case.makespan <= case.closed_form(case.slowest_stage)
    if case.costs.exit[-1] == max(case.costs.exit):
        assert case.makespan == case.closed_form(case.slowest_stage)


@given(cases(schedules=["gpipe"], max_exit=0))
@settings(max_examples=100)
def test_gpipe_without_exits_has_a_closed_form_for_all_costs(case: Case) -> None:
    assert case.makespan == case.closed_form(max(case.costs.forward) + max(case.costs.backward))


@pytest.mark.parametrize(
    ("num_microbatches", "costs", "makespan", "form"),
    [
        pytest.param(2, StageCosts((1, 0, 0), (0, 0, 0), (0, 1, 0)), 4, 3, id="slowest in F and in B are two stages"),
        pytest.param(2, StageCosts((2, 1, 1), (0, 3, 0), (4, 2, 2)), 21, 18, id="slowest in F and in X are two stages"),
        pytest.param(1, StageCosts((1, 1), (9, 0), (2, 2)), 12, 6, id="an exit longer than its wait"),
    ],
)
def test_max_of_the_sums_is_no_bound_for_unequal_stages(
    num_microbatches: int, costs: StageCosts, makespan: int, form: int
) -> None:
    case = Case("1f1b", num_microbatches, costs)
    assert (case.makespan, case.closed_form(case.slowest_stage)) == (makespan, form)
