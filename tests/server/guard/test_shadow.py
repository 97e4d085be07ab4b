"""Which answers full depth judges, and what comes of it."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitParams
from megatron_ee.inference.request import Emission, Logprobs
from megatron_ee.server.guard.shadow import Shadow

EXITS = (3, 6)
EARLY = ExitParams()


def said(token: int, layer: int, *, likeliest: int | None = None) -> Emission:
    top = {token if likeliest is None else likeliest: -0.1, 99: -3.0}
    return Emission(token, layer, 0.9, Logprobs(-0.1, top))


ANSWER = [said(10, 6), said(11, 12), said(12, 3, likeliest=13)]


def test_what_left_early_is_judged_by_the_exits_own_choice() -> None:
    shadow = Shadow(1.0, num_layers=12)
    assert shadow.draw(EARLY, EXITS)
    assert shadow.offer([1, 2], ANSWER, busy=False)
    suspect = shadow.pop()
    assert suspect is not None and shadow.pop() is None
    assert suspect.tokens == (1, 2, 10, 11, 12)
    assert suspect.choices == {2: 10, 4: 13}
    full = [Logprobs(-1.0, {token: -0.5, 99: -1.0}) for token in (2, 10, 50, 13)]  # of the tokens from the second on
    assert shadow.judge(suspect, full) == (2, 2)
    full[1], full[3] = (Logprobs(-1.0, {token: -0.5}) for token in (99, 12))
    shadow.offer([1, 2], ANSWER, busy=False)
    again = shadow.pop()
    assert again is not None and shadow.judge(again, full) == (0, 2)
    assert (shadow.drawn, shadow.judged, shadow.dropped) == (1, 2, 0)


def test_of_a_long_answer_the_beginning_is_judged() -> None:
    shadow = Shadow(1.0, num_layers=12, longest=4)
    shadow.offer([1, 2], ANSWER, busy=False)
    suspect = shadow.pop()
    assert suspect is not None and (suspect.tokens, suspect.choices) == ((1, 2, 10, 11), {2: 10})


def test_a_busy_server_judges_nothing_and_few_wait_at_a_time() -> None:
    shadow = Shadow(1.0, num_layers=12, most=2)
    assert not shadow.offer([1], ANSWER, busy=True)
    assert [shadow.offer([1], ANSWER, busy=False) for _ in range(3)] == [True, True, False]
    assert len(shadow) == 2
    suspect = shadow.pop()
    assert suspect is not None and not shadow.offer([1], ANSWER, busy=False)  # one waits and one runs
    shadow.drop()
    assert shadow.offer([1], ANSWER, busy=False)
    assert shadow.dropped == 4


@pytest.mark.parametrize("answer", [[], [said(1, 12)], [Emission(1, 3, 0.9)]])
def test_an_answer_without_anything_to_judge_is_dropped(answer: list[Emission]) -> None:
    shadow = Shadow(1.0, num_layers=12)
    assert not shadow.offer([1], answer, busy=False)
    assert shadow.dropped == 1


@pytest.mark.parametrize(
    "exit", [{"mode": "full"}, {"threshold": 1.0}, {"mode": "speculative"}, {"min_exit": 9}, {"mode": "sled"}]
)
def test_who_may_not_leave_early_is_not_drawn(exit: dict) -> None:
    assert not Shadow(1.0, num_layers=12).draw(ExitParams.model_validate(exit), EXITS)


@given(share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_the_share_is_kept_to(share: float, seed: int) -> None:
    shadow = Shadow(share, num_layers=12, random=Random(seed))
    count = sum(shadow.draw(EARLY, EXITS) for _ in range(2000))
    assert abs(count - 2000 * share) <= 6 * (2000 * share * (1 - share)) ** 0.5 + 1e-9
    assert count == shadow.drawn


def test_nothing_of_a_request_decides_whether_it_is_drawn() -> None:
    """The same random numbers choose the same requests, whatever these are; and others choose others."""
    requests = [ExitParams(), ExitParams(threshold=0.1, exits=(3,)), ExitParams(patience=2), ExitParams(min_exit=6)]

    def drawn(exit: ExitParams, random: Random | None) -> list[bool]:
        shadow = Shadow(0.5, num_layers=12, random=random)
        return [shadow.draw(exit, EXITS) for _ in range(64)]

    first = drawn(requests[0], Random(7))
    assert all(drawn(exit, Random(7)) == first for exit in requests)
    assert drawn(requests[0], None) != drawn(requests[0], None) != first
