"""P-values are valid: where the risk is above the target, they are small no more often than they say."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.calibration.guarantees import P_VALUES
from megatron_ee.inference.calibration.p_values import betting, hoeffding_bentkus, stakes

PValue = Callable[[np.ndarray, float], float]
TARGETS = st.floats(0.01, 0.5)


def _coins(heads: int, count: int) -> np.ndarray:
    return np.array([1.0] * heads + [0.0] * (count - heads))


@given(count=st.integers(1, 300), target=TARGETS)
def test_of_coins_at_the_target_the_p_value_is_valid_exactly(count: int, target: float) -> None:
    """Over all numbers of heads, with the probability of each: the worst case of a risk that is not below it."""
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(target) + (count - k) * math.log1p(-target)
        for k in range(count + 1)
    ]  # fmt: skip
    reached = 0.0
    for heads in range(count + 1):  # p-values rise with the heads, so these are all that are at most this one's
        reached += math.exp(logs[heads])
        assert reached <= hoeffding_bentkus(_coins(heads, count), target) + 1e-9 or reached > 1 - 1e-9


def test_of_few_coins_bets_are_valid_exactly() -> None:
    """Over all orders of twelve losses, of which order matters here."""
    target = 0.3
    found = []
    for losses in product((0.0, 1.0), repeat=12):
        heads = sum(losses)
        found.append((betting(np.array(losses), target), target**heads * (1 - target) ** (12 - heads)))
    reached = 0.0
    for p_value, probability in sorted(found):
        reached += probability
        assert reached <= p_value + 1e-9 or p_value == 1.0


@pytest.mark.parametrize("p_value", P_VALUES.values(), ids=P_VALUES)
@pytest.mark.parametrize("spread", [0.5, 5.0, 50.0], ids=["wide", "middling", "narrow"])
def test_of_any_losses_at_the_target_it_is_seldom_small(p_value: PValue, spread: float) -> None:
    """Beta-distributed with a mean of the target: at most 10 % may be at most .1; 4 standard errors more are chance."""
    generator = np.random.default_rng(7)
    target, tries = 0.1, 2000
    losses = generator.beta(target * spread, (1 - target) * spread, size=(tries, 60))
    small = sum(p_value(losses_N, target) <= 0.1 for losses_N in losses) / tries
    assert small <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / tries)


@given(losses=st.lists(st.floats(0, 1), min_size=1, max_size=50), target=TARGETS)
def test_they_are_probabilities(losses: list[float], target: float) -> None:
    for p_value in P_VALUES.values():
        assert 0 < p_value(np.array(losses), target) <= 1


@given(count=st.integers(1, 200), heads=st.data(), target=TARGETS)
def test_more_losses_are_never_better(count: int, heads: st.DataObject, target: float) -> None:
    fewer = heads.draw(st.integers(0, count - 1))
    assert hoeffding_bentkus(_coins(fewer, count), target) <= hoeffding_bentkus(_coins(fewer + 1, count), target)


@pytest.mark.parametrize("p_value", P_VALUES.values(), ids=P_VALUES)
def test_losses_above_the_target_show_nothing(p_value: PValue) -> None:
    assert p_value(np.full(1000, 0.2), 0.1) > 0.9


@pytest.mark.parametrize("p_value", P_VALUES.values(), ids=P_VALUES)
def test_many_small_losses_show_much(p_value: PValue) -> None:
    assert p_value(np.full(300, 0.01), 0.1) < 1e-6


def test_without_a_loss_it_is_the_chance_of_that() -> None:
    """(1 - target) ** N, which Hoeffding's bound is then."""
    assert hoeffding_bentkus(np.zeros(40), 0.05) == pytest.approx(0.95**40)


def test_bets_need_fewer_where_losses_spread_little() -> None:
    losses_N = np.random.default_rng(3).uniform(0.02, 0.06, size=200)
    assert betting(losses_N, 0.06) < 0.05 < 0.4 < hoeffding_bentkus(losses_N, 0.06)


@given(seed=st.integers(0, 1000), at=st.integers(0, 99))
def test_a_stake_knows_nothing_of_its_own_loss_and_later_ones(seed: int, at: int) -> None:
    """Whoever bets with what comes next always wins, and p-values would be too small."""
    losses_N = np.random.default_rng(seed).uniform(size=100)
    changed_N = losses_N.copy()
    changed_N[at:] = 1 - losses_N[at:]
    kept, target = slice(0, at + 1), 0.5
    stakes_N = stakes(losses_N, target)
    np.testing.assert_array_equal(stakes_N[kept], stakes(changed_N, target)[kept])
    assert len(set(stakes_N[10:])) == 90, "none of them is at its limit, where it would know nothing anyway"
