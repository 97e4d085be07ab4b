"""What drafts gain, against sums over everything that full depth may say of them."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.speculation.law import DraftCosts, best_length, gain, tokens_per_cycle

SHARES = st.floats(0.0, 1.0)
COSTS = st.builds(
    DraftCosts,
    shallow=st.floats(0.1, 20),
    head=st.floats(0.0, 10),
    deep=st.floats(0.1, 20),
    row=st.floats(0.0, 2),
    several=st.sampled_from([0.0, 0.5, 3.0]),
)


def _expected_tokens(acceptance: float, length: int) -> float:
    """Over all sequences of accepted and rejected tokens."""
    total = 0.0
    for accepted in product((True, False), repeat=length):
        p = 1.0
        for is_accepted in accepted:
            p *= acceptance if is_accepted else 1 - acceptance
        total += p * (1 + (accepted.index(False) if False in accepted else length))
    return total


@given(SHARES, st.integers(0, 7))
def test_tokens_of_a_cycle_are_those_expected_of_what_may_be_accepted(acceptance: float, length: int) -> None:
    assert tokens_per_cycle(acceptance, length) == pytest.approx(_expected_tokens(acceptance, length))
    if acceptance < 0.99:
        assert tokens_per_cycle(acceptance, length) == pytest.approx(
            (1 - acceptance ** (length + 1)) / (1 - acceptance)
        )


@given(SHARES, st.integers(0, 7), COSTS)
def test_a_gain_is_tokens_over_costs_beside_full_depth(acceptance: float, length: int, costs: DraftCosts) -> None:
    """d (c_1..E + h) + c_1..E + c_E+1..L(d + 1 rows, with the final head)."""
    drafting = length * (costs.shallow + costs.head)
    verifying = costs.shallow + costs.deep + length * costs.row + (costs.several if length else 0)
    full = costs.shallow + costs.deep
    assert costs.cycle(length) == pytest.approx(drafting + verifying)
    expected = _expected_tokens(acceptance, length) / (drafting + verifying) * full
    assert gain(acceptance, length, costs) == pytest.approx(expected)
    assert gain(acceptance, 0, costs) == 1
    assert costs.share_left_out == pytest.approx(costs.deep / full)


@given(SHARES, COSTS, st.integers(0, 9))
def test_no_length_gains_more_than_the_best_one(acceptance: float, costs: DraftCosts, most: int) -> None:
    gains = [gain(acceptance, length, costs) for length in range(most + 1)]
    value, length = best_length(acceptance, costs, most)
    assert value == pytest.approx(max(gains))
    assert value == pytest.approx(gains[length])


def test_where_nothing_gains_nothing_is_drafted() -> None:
    free, dear, even = DraftCosts(0.0, 0.0, 1.0), DraftCosts(1.0, 3.0, 1.0), DraftCosts(1.0, 0.0, 1.0, row=1.0)
    assert best_length(0.0, free, 5) == (1.0, 0), "drafts that cost nothing and bring nothing"
    assert best_length(0.9, dear, 5) == (1.0, 0)
    assert best_length(1.0, even, 5) == (1.0, 0), "drafts that bring what they cost"
    assert best_length(1.0, free, 5) == (6.0, 5)
