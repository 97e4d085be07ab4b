"""Where and how far requests draft, by simulation: texts whose drafted tokens are accepted by chance, with costs in
layers. What is stated here are the shares of the speed of whoever knew the acceptance of every exit from the start."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.speculation.law import DraftCosts, best_length
from megatron_ee.inference.speculation.pace import MOST_DRAFTED, Pace

Acceptance = Mapping[int, float]

MODELS: list[tuple[int, tuple[int, ...]]] = [
    (8, (2,)),
    (12, (3, 6)),
    (32, (8, 16, 24)),
    (32, tuple(range(1, 32))),
]
HEADS = (0.2, 2.0)
"""Of a head, in layers."""
SHAPES: dict[str, Callable[[float], float]] = {
    "never": lambda share: 0.0,
    "seldom": lambda share: share**2,
    "the deeper the more": lambda share: 0.2 + 0.8 * share,
    "soon nearly always": lambda share: share**0.3,
    "alike at all exits": lambda share: 0.6,
    "nearly always": lambda share: 0.95,
}
"""Acceptance, by the share of the layers that an exit runs."""


def costs_of(num_layers: int, exits: Sequence[int], head: float) -> dict[int, DraftCosts]:
    return {layer: DraftCosts(layer, head, num_layers - layer + head, 0.02 * num_layers) for layer in exits}


class Text:
    """Tokens of one request, and the speed at which they come, full depth's being 1."""

    def __init__(self, costs: Mapping[int, DraftCosts], seed: int = 0) -> None:
        self._costs, self._numbers, self.pace = costs, random.Random(seed), Pace(costs, None)

    def speed(self, acceptance: Acceptance, num_tokens: int) -> float:
        tokens, cost = 0, 0.0
        while tokens < num_tokens:
            layer, length = self.pace.next(num_tokens - tokens - 1)
            accepted = 0
            while accepted < length and self._numbers.random() < acceptance[layer]:
                accepted += 1
            self.pace.see(layer, drafted=length, accepted=accepted)
            tokens += accepted + 1
            cost += self._costs[layer].cycle(length)
        return tokens * next(iter(self._costs.values())).full / cost


def best_speed(costs: Mapping[int, DraftCosts], acceptance: Acceptance) -> float:
    return max(best_length(acceptance[layer], of, MOST_DRAFTED)[0] for layer, of in costs.items())


def shares(shape: str, num_tokens: int, *, after: int = 0) -> list[tuple[float, float]]:
    """For each model and head: the best speed, and the share of it that texts have, two on average."""
    found = []
    for (num_layers, exits), head in product(MODELS, HEADS):
        costs = costs_of(num_layers, exits, head)
        acceptance = {layer: SHAPES[shape](layer / num_layers) for layer in exits}
        best, speeds = best_speed(costs, acceptance), []
        for seed in range(2):
            text = Text(costs, seed)
            if after:
                text.speed(acceptance, after)
            speeds.append(text.speed(acceptance, num_tokens) / best)
        found.append((best, sum(speeds) / 2))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_comes_to_nearly_the_best_speed(shape: str) -> None:
    """Of its first 128 tokens at least 0.8 of it, of those after 512 at least 0.88, and 0.93 on average."""
    assert min(share for _, share in shares(shape, 128)) > 0.8
    later = [share for _, share in shares(shape, 256, after=512)]
    assert min(later) > 0.88
    assert sum(later) / len(later) > 0.93


@pytest.mark.parametrize("shape", ["never", "seldom"])
def test_where_nothing_pays_little_is_lost(shape: str) -> None:
    """At most 5 % of a text of 128 tokens, and 3 % of a long one, of however many exits."""
    for num_tokens, least in ((128, 0.95), (1000, 0.97)):
        of_useless = [share for best, share in shares(shape, num_tokens) if best == 1]
        assert len(of_useless) >= 3
        assert min(of_useless) > least


def test_an_exit_that_has_failed_is_tried_again() -> None:
    """Texts change: after 300 tokens of which none was accepted, and 200 more, it drafts as if it had never failed."""
    costs = costs_of(12, (4,), 0.5)
    text = Text(costs)
    assert text.speed({4: 0.0}, 300) > 0.95
    text.speed({4: 0.95}, 200)
    assert text.speed({4: 0.95}, 300) > 0.9 * best_speed(costs, {4: 0.95}) > 1.5


def test_of_several_exits_the_one_that_gains_most_drafts() -> None:
    costs = costs_of(12, (3, 6, 9), 0.2)
    for acceptance, chosen in (({3: 0.9, 6: 0.92, 9: 0.95}, 3), ({3: 0.1, 6: 0.95, 9: 0.96}, 6)):
        text = Text(costs)
        text.speed(acceptance, 600)
        layer, length = text.pace.next(100)
        assert layer == chosen
        assert abs(length - best_length(acceptance[layer], costs[layer], MOST_DRAFTED)[1]) <= 3


SEEN = st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1)), max_size=40)


@given(SEEN, st.sampled_from([None, 1, 5]), st.integers(1, MOST_DRAFTED), st.sampled_from(MODELS))
def test_it_never_drafts_beyond_its_room_and_knows_no_chance(
    rooms: list[tuple[int, float]], length: int | None, most: int, model: tuple[int, tuple[int, ...]]
) -> None:
    costs = costs_of(*model, 0.5)
    one, other = Pace(costs, length, most), Pace(costs, length, most)
    for room, share in rooms:
        layer, drafted = one.next(room)
        assert (layer, drafted) == other.next(room) == one.next(room)
        assert layer in costs
        assert drafted == min(room, length) if length else 0 <= drafted <= min(room, most)
        for pace in (one, other):
            pace.see(layer, drafted=drafted, accepted=round(share * drafted))


def test_what_comes_after_the_first_wrong_token_is_no_evidence() -> None:
    costs = costs_of(12, (3, 6), 0.2)
    one, other = Pace(costs, None), Pace(costs, None)
    for _ in range(6):
        one.see(3, drafted=5, accepted=2)
        other.see(3, drafted=3, accepted=2)
        assert one.next(20) == other.next(20)


def test_a_draft_of_given_length_comes_from_the_exit_that_gains_most_by_it() -> None:
    """Also where none gains: it was asked for."""
    costs = costs_of(12, (3, 6), 0.2)
    pace = Pace(costs, 4)
    assert pace.next(20) == (3, 4) and pace.next(2) == (3, 2) and pace.next(0)[1] == 0
    for _ in range(30):
        pace.see(3, drafted=4, accepted=0)
        pace.see(6, drafted=4, accepted=4)
    assert pace.next(20) == (6, 4)
    pace = Pace(costs, 4)
    for _ in range(200):
        pace.see(pace.next(9)[0], drafted=4, accepted=0)
    assert pace.next(20)[1] == 4
