"""Loss weights and the learning rate over time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitsConfig, OptimizerConfig, WeightScheduleConfig
from megatron_ee.training.loss_weights import loss_weights
from megatron_ee.training.lr_schedule import DECAYS, LearningRate


def _exits(shape: str, start: float = 0.0, warmup_iters: int = 100) -> ExitsConfig:
    schedule = {"shape": shape, "start": start, "warmup_iters": warmup_iters}
    return ExitsConfig.model_validate({"layers": [3, 6], "weights": [0.1, 0.2], "weight_schedule": schedule})


def test_default_warm_up_takes_a_thousand_iterations_from_zero() -> None:
    assert WeightScheduleConfig() == WeightScheduleConfig(shape="linear", start=0.0, warmup_iters=1000)


@pytest.mark.parametrize(
    ("shape", "start", "iteration", "expected"),
    [
        ("linear", 0.0, 0, [0.0, 0.0]),
        ("linear", 0.0, 25, [0.025, 0.05]),
        ("linear", 0.0, 100, [0.1, 0.2]),
        ("linear", 0.0, 5000, [0.1, 0.2]),
        ("linear", 0.4, 50, [0.25, 0.3]),  # a cool-down
        ("cosine", 0.0, 50, [0.05, 0.1]),
        ("cosine", 0.0, 25, [0.1 * 0.1464466, 0.2 * 0.1464466]),
        ("constant", 0.7, 0, [0.1, 0.2]),
    ],
)
def test_loss_weights(shape: str, start: float, iteration: int, expected: list[float]) -> None:
    weights = loss_weights(_exits(shape, start), 12, iteration)
    assert [weights[3], weights[6]] == pytest.approx(expected)
    assert weights[12] == 1.0
    assert list(weights) == [3, 6, 12]


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, [0.0, 1.0, 0.3]),
        (50, [0.1, 1.0 - 0.8 * 0.1464466, 0.3]),
        (100, [0.2, 0.6, 0.3]),
        (200, [0.2, 0.2, 0.3]),
        (900, [0.2, 0.2, 0.3]),
    ],
)
def test_each_exit_may_have_a_schedule_of_its_own(iteration: int, expected: list[float]) -> None:
    """A warm-up, a cool-down that takes twice as long, and a constant, which has no start."""
    schedules = [
        {"start": 0.0, "warmup_iters": 100},
        {"start": 1.0, "warmup_iters": 200, "shape": "cosine"},
        {"shape": "constant", "start": 9.0},
    ]
    exits = ExitsConfig.model_validate({"layers": [3, 6, 9], "weights": [0.2, 0.2, 0.3], "weight_schedule": schedules})
    weights = loss_weights(exits, 12, iteration)
    assert [weights[layer] for layer in (3, 6, 9)] == pytest.approx(expected)
    assert weights[12] == 1.0


def test_a_list_of_equal_schedules_is_one_for_all() -> None:
    schedule = {"shape": "cosine", "start": 0.5, "warmup_iters": 70}
    listed = ExitsConfig.model_validate(
        {"layers": [3, 6], "weights": [0.1, 0.2], "weight_schedule": [schedule, schedule]}
    )
    for iteration in (0, 10, 69, 70, 1000):
        assert loss_weights(listed, 12, iteration) == loss_weights(_exits("cosine", 0.5, 70), 12, iteration)


def test_no_warm_up_is_the_target_at_once() -> None:
    assert loss_weights(_exits("linear", warmup_iters=0), 12, 0)[3] == 0.1


@given(st.sampled_from(["linear", "cosine"]), st.floats(0, 2), st.integers(0, 10**6), st.integers(0, 10**6))
def test_weights_go_monotonically_from_start_to_target(shape: str, start: float, first: int, second: int) -> None:
    exits = _exits(shape, start, warmup_iters=10**5)
    earlier, later = (loss_weights(exits, 12, iteration)[3] for iteration in sorted((first, second)))
    assert abs(later - 0.1) <= abs(earlier - 0.1) + 1e-12


def _rates(decay: str, train_iters: int, **fields: Any) -> list[float]:
    rate = LearningRate(OptimizerConfig(lr_decay=decay, **fields), train_iters, DECAYS[decay])
    return [rate(iteration) for iteration in range(train_iters + 1)]


def test_cosine_decay_after_the_warm_up() -> None:
    rates = _rates("cosine", 12, lr=1.0, min_lr=0.1, lr_warmup_iters=4)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.55), "half-way down"
    assert rates[12] == pytest.approx(0.1)


def test_other_decays() -> None:
    assert _rates("linear", 4, lr=1.0, min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert _rates("constant", 4, lr=1.0, lr_warmup_iters=2) == [0.5, 1, 1, 1, 1]
    wsd = _rates("wsd", 8, lr=1.0, min_lr=0.0, lr_warmup_iters=2, lr_cooldown_iters=4)
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


@given(st.sampled_from(sorted(DECAYS)), st.integers(1, 50), st.data())
def test_the_rate_never_rises_after_the_warm_up(decay: str, train_iters: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, train_iters - 1))
    cooldown = data.draw(st.integers(1, train_iters - warmup))
    rates = _rates(decay, train_iters, lr=1.0, min_lr=0.25, lr_warmup_iters=warmup, lr_cooldown_iters=cooldown)
    assert rates[warmup] == pytest.approx(1.0)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(1.0 if decay == "constant" else 0.25)
