"""Budgets: what is set aside, what is paid, and that no client takes more than its due in any span of time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitParams
from megatron_ee.server.guard.budgets import (
    Accounts,
    OverBudgetError,
    Reservation,
    TooLargeForBudgetError,
    layer_tokens,
    most_layer_tokens,
)
from megatron_ee.server.guard.keys import ANYBODY, Client

CLIENT = Client("a", layer_tokens=100.0, window=10.0)


def test_the_rest_is_given_back() -> None:
    accounts = Accounts()
    reservation = accounts.reserve(CLIENT, 80.0, 0.0)
    with pytest.raises(OverBudgetError) as error:
        accounts.reserve(CLIENT, 30.0, 0.0)
    assert error.value.retry_after == 1.0  # 10 are lacking, which come in a second
    assert "20 are free, and this request may take 30" in str(error.value)
    accounts.settle(reservation, 15.0, 0.0)
    assert accounts.free(CLIENT, 0.0) == 85.0
    accounts.settle(reservation, 15.0, 0.0)
    assert accounts.free(CLIENT, 0.0) == 85.0


def test_who_waits_as_long_as_was_said_is_served() -> None:
    accounts = Accounts()
    accounts.settle(accounts.reserve(CLIENT, 100.0, 5.0), 100.0, 5.0)
    with pytest.raises(OverBudgetError) as error:
        accounts.reserve(CLIENT, 60.0, 6.0)
    assert error.value.retry_after == pytest.approx(5.0)
    with pytest.raises(OverBudgetError):
        accounts.reserve(CLIENT, 60.0, 10.9)
    accounts.reserve(CLIENT, 60.0, 11.001)


def test_what_no_waiting_helps_is_another_error() -> None:
    with pytest.raises(TooLargeForBudgetError, match=r"may take 101 layer-tokens, more than the whole budget of 100"):
        Accounts().reserve(CLIENT, 101.0, 0.0)
    Accounts().reserve(CLIENT, 100.0, 0.0)


def test_budgets_are_apart_and_some_have_none() -> None:
    accounts = Accounts()
    accounts.reserve(CLIENT, 100.0, 0.0)
    accounts.reserve(Client("b", 100.0, 10.0), 100.0, 0.0)
    for _ in range(3):
        accounts.settle(accounts.reserve(ANYBODY, 1e12, 0.0), 1e12, 0.0)
    assert accounts.free(ANYBODY, 0.0) is None


def test_a_clock_that_goes_back_fills_nothing() -> None:
    accounts = Accounts()
    accounts.settle(accounts.reserve(CLIENT, 100.0, 50.0), 100.0, 50.0)
    assert accounts.free(CLIENT, 40.0) == 0.0
    assert accounts.free(CLIENT, 51.0) == pytest.approx(10.0)


# What a client does next: waits, asks for so much, or has one of its requests end after a share of that.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(-1.0, 30.0)),
        st.tuples(st.just("ask"), st.floats(0.5, 110.0)),
        st.tuples(st.just("end"), st.tuples(st.integers(0, 99), st.floats(0.0, 1.0))),
        st.tuples(st.just("again"), st.integers(0, 99)),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_span_of_time_sees_more_than_a_full_bucket_and_what_came_in(steps: list) -> None:
    accounts, now, latest = Accounts(), 0.0, 0.0
    going: dict[Reservation, float] = {}
    ended: list[Reservation] = []
    taken: list[tuple[float, float]] = []  # when it was asked for, or paid, whichever makes more of it
    for kind, value in steps:
        if kind == "wait":
            now += value
        elif kind == "ask":
            free = accounts.free(CLIENT, now) or 0.0
            refused = TooLargeForBudgetError if value > 100.0 else OverBudgetError if value > free else None
            if refused is None:
                going[accounts.reserve(CLIENT, value, now)] = now
            else:
                with pytest.raises(refused):
                    accounts.reserve(CLIENT, value, now)
        elif kind == "end" and going:
            reservation = list(going)[value[0] % len(going)]
            del going[reservation]
            before = accounts.free(CLIENT, now) or 0.0
            accounts.settle(reservation, reservation.most * value[1], now)
            after = accounts.free(CLIENT, now) or 0.0
            assert after == pytest.approx(before + reservation.most * (1 - value[1]))
            ended.append(reservation)
            taken.append((latest := max(latest, now), reservation.most * value[1]))
        elif kind == "again" and ended:
            before = accounts.free(CLIENT, now)
            accounts.settle(ended[value % len(ended)], 1e9, now)
            assert accounts.free(CLIENT, now) == before
        latest = max(latest, now)
        assert (accounts.free(CLIENT, now) or 0.0) >= -1e-6
        under_way = sum(reservation.most for reservation in going)
        for start, _ in [*taken, (latest, 0.0)]:
            in_span = sum(used for time, used in taken if time >= start)
            assert in_span + under_way <= 100.0 + 10.0 * (latest - start) + 1e-6


def test_a_price() -> None:
    assert layer_tokens(10, [3, 6, 12], num_layers=12) == 10 * 12 + 21
    assert layer_tokens(10, [12, 12], num_layers=12, discarded=5) == 17 * 12
    assert layer_tokens(10, [], num_layers=12) == 120


@given(
    num_prompt=st.integers(1, 50),
    depths=st.lists(st.integers(1, 12), max_size=20),
    more=st.integers(0, 5),
    length=st.sampled_from([1, 4, "auto"]),
    mode=st.sampled_from(["full", "early_exit", "speculative"]),
    data=st.data(),
)
def test_no_request_costs_more_than_was_set_aside(
    num_prompt: int, depths: list[int], more: int, length: Any, mode: Any, data: st.DataObject
) -> None:
    exit = ExitParams(mode=mode, draft_length=length)
    most = most_layer_tokens(num_prompt, len(depths) + more, exit, num_layers=12)
    drafts = length if mode == "speculative" and length != "auto" else 0
    discarded = data.draw(st.integers(0, drafts * len(depths)))
    assert layer_tokens(num_prompt, depths, num_layers=12, discarded=discarded) <= most
    assert most == (num_prompt + (len(depths) + more) * (1 + drafts)) * 12
