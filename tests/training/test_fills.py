"""A step with fills: every gradient is the weighted sum that training/losses.py describes, by one autograd per stage
over an independent model (fp32), for both kinds of fill at once and masks of unequal length.

EE-LLM's filling pairs activations with other micro-batches' labels where P = 4, deadlocks where P = 8, and is biased.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.one_step import assert_equals_reference, one_step, reference_step
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from helpers.shards import whole
from helpers.tiny import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import Config
from megatron_ee.parallel.pipeline.plan import Fill
from megatron_ee.training.losses import StepTokens


@dataclass(frozen=True)
class Case:
    """Exits on `stages_with_exits` (the middle of each) of P = `pipeline` stages of two layers."""

    pipeline: int
    stages_with_exits: tuple[int, ...]
    fills: tuple[Fill, ...] | None  # None: the planner's
    data: int = 1
    exits: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        fills = "planned" if self.fills is None else " ".join(f"{fill.kind[0]}{fill.stage}" for fill in self.fills)
        return f"P={self.pipeline} exits on {self.stages_with_exits} {fills} {'DP2' * (self.data > 1)} {self.exits}"

    def config(self) -> Config:
        return tiny_config(
            exits={"layers": [2 * stage + 1 for stage in self.stages_with_exits], **self.exits},
            model={"num_layers": 2 * self.pipeline, **self.model},
            parallel={
                "pipeline": self.pipeline,
                "data": self.data,
                "schedule": "filled-1f1b",
                "layout": [{"layers": 2}] * self.pipeline,
            },
            optimizer={"epsilon": 1e-3},
        )


def _warmup(*stages: int) -> tuple[Fill, ...]:
    return tuple(Fill("warmup", stage) for stage in stages)


def _cooldown(*stages: int) -> tuple[Fill, ...]:
    return tuple(Fill("cooldown", stage) for stage in stages)


def _placements(pipeline: int) -> list[tuple[int, ...]]:
    """All sets of stages, the last one aside, that have an exit."""
    flags = product([False, True], repeat=pipeline - 1)
    return [tuple(stage for stage, has_exit in enumerate(choice) if has_exit) for choice in flags]


def _most(pipeline: int, stages: Sequence[int]) -> tuple[Fill, ...]:
    """A fill of every kind that is legal."""
    turns = [stage for stage in reversed(stages) if stage < pipeline - 1]
    return _warmup(*turns) + _cooldown(*range(1, pipeline))


SAMPLE = [
    Case(2, (0,), _most(2, (0,))),
    Case(2, (), _cooldown(1, 1)),
    Case(2, (0, 1), _most(2, (0,)), data=2),
    Case(4, (0, 1, 2), None),
    Case(4, (0, 2), _most(4, (0, 2)), exits={"projection": "own", "head": ["mlp", "block"]}),
    Case(2, (0, 1), _most(2, (0,)), exits={"release": True}, model={"tie_embeddings": True}),
]
ALL_AT_FOUR = [Case(4, stages, fills) for stages in _placements(4) for fills in (_most(4, stages), None)]
MORE_AT_FOUR = [
    Case(4, (0, 1, 2, 3), _most(4, (0, 1, 2))),
    Case(4, (1,), _warmup(1, 1) + _cooldown(2)),
    Case(4, (0, 2), _warmup(2, 0, 0) + _cooldown(1, 3, 2)),
    Case(4, (0, 1), _most(4, (0, 1)), exits={"release": True}, model={"tie_embeddings": True}),
]
AT_EIGHT = [
    Case(8, stages, fills)
    for stages in ((0, 1, 2, 3, 4, 5, 6), (3,), (0, 4), (), (1, 2, 6), (0, 7), (5, 6))
    for fills in (_most(8, stages), None)
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_ee_llm_mislabels_fills_and_weights_them_with_bias(case: Case, ranks: RankPool) -> None:
    _check(case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ALL_AT_FOUR, *MORE_AT_FOUR], ids=lambda case: case.name)
def test_every_placement_of_exits_on_four_stages(case: Case, ranks: RankPool) -> None:
    _check(case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", AT_EIGHT, ids=lambda case: case.name)
def test_ee_llm_deadlocks_on_eight_stages(case: Case, ranks: RankPool) -> None:
    _check(case, ranks)


def test_swapped_labels_would_be_seen(ranks: RankPool) -> None:
    """The oracle, once with the labels of the two kinds of fill exchanged: far from what the ranks computed."""
    case = Case(2, (0,), _most(2, (0,)))
    results = ranks.run(2, one_step, case.config(), case.fills)
    parameters = whole(result["parameters"] for result in results)
    measured = whole(result["gradients"] for result in results)
    exchanged = tuple(reversed(case.fills or ()))  # sample 8 counts as the cool-down's, sample 9 as the warm-up's
    _, gradients = reference_step(case.config(), parameters, results[0]["layout"], exchanged)
    worst = max(float(np.abs(measured[name] - gradient).max()) for name, gradient in gradients.items())
    assert worst > 1e-2


def test_the_losses_that_are_reported_are_of_the_regular_batch(ranks: RankPool) -> None:
    config = Case(2, (0,), None).config()
    unfilled = config.model_copy(update={"parallel": config.parallel.model_copy(update={"schedule": "1f1b"})})
    filled = ranks.run(2, one_step, config, _most(2, (0,)))[0]["figures"]
    plain = ranks.run(2, one_step, unfilled)[0]["figures"]
    for name in ("train/exit_1/loss", "train/exit_4/loss", "train/loss"):
        assert filled[name] == pytest.approx(plain[name], rel=1e-6)


def test_fills_are_drawn_from_the_data_and_a_resumed_run_goes_on_after_them(tmp_path: Path, ranks: RankPool) -> None:
    write_small_dataset(tmp_path)
    layout = [{"layers": 2}, {"layers": 6}]  # one stage has room for fills
    parallel = {"pipeline": 2, "schedule": "filled-1f1b", "layout": layout}

    def config(name: str) -> Config:
        return run_config(tmp_path, name=name, parallel=parallel, exits={"layers": [1, 2, 5]})

    whole_run = ranks.run(2, train, config("whole"))
    ranks.run(2, _stop_at_three, config("stopped"))
    resumed = ranks.run(2, train, config("stopped"))
    figures = whole_run[0]["figures"]
    per_step = figures[1]["train/tokens"] / 16
    assert per_step > 4, "a batch of 4 sequences, and fills"
    assert [figures[iteration]["train/tokens"] for iteration in range(1, 7)] == [16 * per_step * i for i in range(1, 7)]
    for iteration in (4, 5, 6):
        for name, value in resumed[0]["figures"][iteration].items():
            if name.startswith("train/"):
                assert value == figures[iteration][name], (iteration, name)


def _stop_at_three(config: Config) -> None:
    train(config, until=3, save=True)


def _check(case: Case, ranks: RankPool) -> None:
    config = case.config()
    results = ranks.run(case.pipeline * case.data, one_step, config, case.fills)
    assert_equals_reference(config, results)


@st.composite
def _steps(draw: st.DrawFn) -> tuple[float, list[Fill], list[int], int, list[int]]:
    num_stages = draw(st.integers(2, 6))
    fill = st.one_of(
        st.builds(Fill, st.just("warmup"), st.integers(0, num_stages - 2)),
        st.builds(Fill, st.just("cooldown"), st.integers(1, num_stages - 1)),
    )
    fills = draw(st.lists(fill, max_size=6))
    counts = draw(st.lists(st.integers(0, 50), min_size=len(fills), max_size=len(fills)))
    exits = draw(st.lists(st.integers(0, num_stages - 1), min_size=1, max_size=6))
    return float(draw(st.integers(1, 100))), fills, counts, num_stages, exits


@given(_steps())
def test_every_pair_of_an_exit_and_a_stage_has_weight_one(
    step: tuple[float, list[Fill], list[int], int, list[int]],
) -> None:
    """Samples of equal loss per token: what an exit adds to a stage's gradient is as without fills."""
    regular, fills, counts, num_stages, exits = step
    numbered = list(zip(fills, counts, strict=True))

    def tokens(stage: int) -> StepTokens:
        def of_kind(kind: str) -> float:
            return float(sum(count for fill, count in numbered if fill.kind == kind and fill.trains(stage)))

        return StepTokens(regular, of_kind("warmup"), of_kind("cooldown"))

    for exit_stage, stage in product(exits, range(num_stages)):
        if stage > exit_stage:
            continue
        weight = regular / tokens(exit_stage).loss_divisor(None)
        for fill, count in numbered:
            if fill.trains(exit_stage) and fill.trains(stage):
                weight += count / tokens(exit_stage).loss_divisor(fill)
        assert weight * tokens(stage).gradient_factor == pytest.approx(1.0)
