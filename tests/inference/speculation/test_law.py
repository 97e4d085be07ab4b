"""What drafts gain, and how long they should be."""

import random

import pytest

from megatron_ee.inference.speculation.law import DraftCosts, best_length, gain, tokens_per_cycle


def test_a_draft_that_is_always_right_costs_less_and_less_a_token() -> None:
    costs = DraftCosts(shallow=2.0, head=1.0, deep=7.0, row=0.5, several=1.5)
    assert costs.full == 9
    assert costs.cycle(0) == 9
    assert costs.cycle(3) == 3 * (2 + 1) + 9 + 1.5 + 3 * 0.5
    assert tokens_per_cycle(1.0, 3) == 4
    assert tokens_per_cycle(0.5, 2) == 1.75
    assert gain(1.0, 3, costs) == pytest.approx(4 * 9 / 21)
    assert gain(0.0, 0, costs) == 1


def test_the_best_length_is_that_of_all_gains() -> None:
    numbers = random.Random(0)
    drafted = []
    for _ in range(300):
        shallow, head, deep, row, several = (numbers.choice([0.1, 1.0, 4.0]) * numbers.random() for _ in range(5))
        costs, acceptance, most = DraftCosts(shallow, head, deep, row, several), numbers.random(), numbers.randrange(14)
        gains = [gain(acceptance, length, costs) for length in range(most + 1)]
        best, length = best_length(acceptance, costs, most)
        assert best == pytest.approx(max(gains))
        assert gains[length] == pytest.approx(best)
        drafted.append(length)
    assert drafted.count(0) > 20 and len(set(drafted)) > 8


def test_where_no_token_is_ever_right_nothing_is_drafted() -> None:
    assert best_length(0.0, DraftCosts(0.1, 0.1, 10.0), 12) == (1.0, 0)
    assert best_length(1.0, DraftCosts(1.0, 1.0, 10.0), 0) == (1.0, 0)
