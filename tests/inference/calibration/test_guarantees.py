"""Promises are kept as often as they say, on data whose risks are known; and what would break them would be seen."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.calibration.guarantees import (
    P_VALUES,
    choose_candidate,
    conformal_risk_control,
    learn_then_test,
)
from megatron_ee.inference.calibration.p_values import hoeffding_bentkus

REPETITIONS, TARGET, DELTA = 200, 0.1, 0.1
Losses = np.ndarray
Draw = Callable[[np.random.Generator, np.ndarray, int], Losses]

FINE_J = np.array([0.0, 0.02, 0.05, 0.08, 0.095, 0.101, 0.11, 0.13, 0.2, 0.4])
COARSE_J = np.array([0.0, 0.03, 0.12, 0.3])
"""Risks of candidates: of which the last good one is near the target, or far from it and the next one beyond."""


def _coins(generator: np.random.Generator, risks_J: np.ndarray, inputs: int) -> Losses:
    """The same inputs for all candidates: whoever fails one fails it with all that are more eager."""
    hardness_N = generator.uniform(size=inputs)
    return (hardness_N < risks_J[:, None]).astype(float)


def _shares(generator: np.random.Generator, risks_J: np.ndarray, inputs: int) -> Losses:
    """Of 32 tokens of a text."""
    return generator.binomial(32, risks_J[:, None], size=(len(risks_J), inputs)) / 32


def _most_violations(probability: float, chance: float = 1e-4) -> int:
    """So many of the repetitions may violate the target: one more is rarer than chance."""
    pmf = [math.comb(REPETITIONS, k) * probability**k * (1 - probability) ** (REPETITIONS - k) for k in range(201)]
    return next(k for k in range(201) if sum(pmf[k + 1 :]) <= chance)


def _violations(
    choose: Callable[[Losses], int | None], draw: Draw, risks_J: np.ndarray, inputs: int
) -> tuple[int, set[int | None]]:
    generator = np.random.default_rng(11)
    chosen = [choose(draw(generator, risks_J, inputs)) for _ in range(REPETITIONS)]
    return sum(number is not None and risks_J[number] > TARGET for number in chosen), set(chosen)


def _first_failing(losses_JN: Losses) -> int | None:
    """The mistake that is made most: what is returned is the candidate that ended the tests."""
    last = learn_then_test(losses_JN, TARGET, DELTA)
    return min(len(losses_JN) - 1, 0 if last is None else last + 1)


def _any_that_passes(losses_JN: Losses) -> int | None:
    """Another one: tests go on after a failure, each at the whole delta."""
    passing = [n for n, losses_N in enumerate(losses_JN) if hoeffding_bentkus(losses_N, TARGET) <= DELTA]
    return passing[-1] if passing else None


@pytest.mark.parametrize("draw", [_coins, _shares])
@pytest.mark.parametrize("method", P_VALUES)
@pytest.mark.parametrize("inputs", [60, 400])
@pytest.mark.parametrize("risks_J", [FINE_J, COARSE_J], ids=["fine", "coarse"])
def test_of_200_calibrations_no_more_violate_the_target_than_promised(
    method: str, draw: Draw, risks_J: np.ndarray, inputs: int
) -> None:
    def choose(losses_JN: Losses) -> int | None:
        return learn_then_test(losses_JN, TARGET, DELTA, p_value=P_VALUES[method])

    violations, chosen = _violations(choose, draw, risks_J, inputs)
    assert violations <= _most_violations(DELTA)
    assert chosen - {None, 0}, "and something is promised at all"


def test_the_first_candidate_that_fails_would_be_seen() -> None:
    for draw in (_coins, _shares):
        violations, _ = _violations(_first_failing, draw, COARSE_J, 400)
        assert violations > _most_violations(DELTA)


def test_tests_that_go_on_after_a_failure_would_be_seen() -> None:
    """Of many candidates with a risk just above the target, one passes by chance."""
    generator = np.random.default_rng(5)
    risks_J = np.full(40, TARGET * 1.02)
    draws = [(generator.uniform(size=(40, 150)) < risks_J[:, None]).astype(float) for _ in range(REPETITIONS)]
    assert sum(_any_that_passes(losses_JN) is not None for losses_JN in draws) > _most_violations(DELTA)
    fixed = sum(learn_then_test(losses_JN, TARGET, DELTA) is not None for losses_JN in draws)
    assert fixed <= _most_violations(DELTA)


@pytest.mark.parametrize("draw", [_coins, _shares])
@pytest.mark.parametrize("inputs", [30, 200])
@pytest.mark.parametrize("risks_J", [FINE_J, COARSE_J], ids=["fine", "coarse"])
def test_conformal_risk_is_at_most_the_target_on_average(draw: Draw, risks_J: np.ndarray, inputs: int) -> None:
    generator = np.random.default_rng(13)
    risks = []
    for _ in range(REPETITIONS):
        number = conformal_risk_control(draw(generator, risks_J, inputs), TARGET)
        risks.append(0.0 if number is None else risks_J[number])
    error = float(np.std(risks)) / math.sqrt(REPETITIONS)
    assert np.mean(risks) <= TARGET + 4 * error
    assert max(risks) >= 0.02, "and something is promised at all"


def test_conformal_risk_without_the_added_loss_would_be_seen() -> None:
    """With few inputs, the one that comes next counts: without it, the average is above the target."""
    generator = np.random.default_rng(17)
    risks_J = np.linspace(0, 0.6, 61)
    risks: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(4000):
        losses_JN = _coins(generator, risks_J, 10)
        right = conformal_risk_control(losses_JN, TARGET)
        wrong = int(np.flatnonzero(losses_JN.mean(1) <= TARGET)[-1])
        risks[True].append(0.0 if right is None else risks_J[right])
        risks[False].append(risks_J[wrong])
    assert np.mean(risks[True]) <= TARGET + 0.01 < np.mean(risks[False])


def test_losses_that_fall_again_are_taken_at_their_highest() -> None:
    losses_JN = np.array([[0.0] * 50, [0.0] * 25 + [1.0] * 25, [0.0] * 50])
    assert conformal_risk_control(losses_JN, 0.1) == 0
    assert learn_then_test(losses_JN, 0.1, 0.1) == 0


def test_nothing_is_returned_where_nothing_is_shown() -> None:
    few_JN = np.zeros((3, 5))
    for method in ("hoeffding_bentkus", "betting", "conformal"):
        assert choose_candidate(few_JN, 0.01, 0.1, method) is None  # type: ignore[arg-type]
        assert choose_candidate(np.zeros((0, 5)), 0.01, 0.1, method) is None  # type: ignore[arg-type]


def test_all_are_returned_where_none_loses_anything() -> None:
    many_JN = np.zeros((3, 2000))
    for method in ("hoeffding_bentkus", "betting", "conformal"):
        assert choose_candidate(many_JN, 0.01, 0.1, method) == 2  # type: ignore[arg-type]


@given(
    losses=st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=1, max_size=6),
    targets=st.tuples(st.floats(0.01, 0.98), st.floats(0.01, 0.98)),
)
def test_a_higher_target_allows_no_less(losses: list[list[float]], targets: tuple[float, float]) -> None:
    low, high = sorted(targets)
    for method in ("hoeffding_bentkus", "conformal"):
        of_low, of_high = (choose_candidate(np.array(losses), of, 0.1, method) for of in (low, high))  # type: ignore[arg-type]
        assert (-1 if of_low is None else of_low) <= (-1 if of_high is None else of_high)


@given(losses=st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=2, max_size=6))
def test_what_comes_after_the_end_changes_nothing(losses: list[list[float]]) -> None:
    whole = np.array(losses)
    for method in ("hoeffding_bentkus", "betting", "conformal"):
        number = choose_candidate(whole, 0.3, 0.2, method)  # type: ignore[arg-type]
        kept = len(losses) if number is None else number + 2
        assert choose_candidate(whole[:kept], 0.3, 0.2, method) == number  # type: ignore[arg-type]
