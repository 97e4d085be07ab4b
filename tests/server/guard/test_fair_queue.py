"""Whose turn it is: shares, order, limits, and that nobody starves."""

from collections import Counter
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.server.guard.fair_queue import FairQueue
from megatron_ee.server.guard.keys import Client

A, B = Client("a"), Client("b")


def drain(queue: FairQueue[str]) -> list[str]:
    """All that can be taken without anything ending."""
    taken = []
    while (item := queue.pop()) is not None:
        taken.append(item)
    return taken


def test_clients_take_turns_and_each_is_served_in_its_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        queue.put(f"a{number}", A, 1.0)
    for number in range(2):
        queue.put(f"b{number}", B, 1.0)
    assert drain(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_costs_and_weights_count() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(12):
        queue.put(f"a{number}", A, 3.0)
        queue.put(f"b{number}", Client("b", weight=2.0), 1.0)
    first = Counter(item[0] for item in drain(queue)[:14])
    assert first == {"a": 2, "b": 12}


def test_one_that_comes_late_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(20):
        queue.put(f"a{number}", A, 1.0)
    for _ in range(10):
        queue.pop()
    for number in range(10):
        queue.put(f"b{number}", B, 1.0)
    assert Counter(item[0] for item in drain(queue)[:10]) == {"a": 5, "b": 5}


def test_idle_times_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("a", A, 1000.0)
    queue.pop()
    queue.release(A)
    for number in range(3):
        queue.put(f"a{number}", A, 1.0)
        queue.put(f"b{number}", B, 1.0)
    assert drain(queue) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_what_was_not_used_is_given_back() -> None:
    orders = []
    for unused in (0.0, 9.0):
        queue: FairQueue[str] = FairQueue()
        queue.put("a", A, 10.0)
        queue.put("b", B, 1.0)
        for number in range(4):
            queue.put(f"a{number}", A, 1.0)
            queue.put(f"b{number}", B, 1.0)
        assert [queue.pop(), queue.pop()] == ["a", "b"]
        queue.release(A, unused=unused)
        orders.append("".join(item[0] for item in drain(queue)))
    assert orders == ["bbbbaaaa", "abababab"]


def test_a_client_at_its_limit_gathers_no_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    limited = Client("a", max_running=1)
    for number in range(40):
        queue.put(f"a{number}", limited, 1.0)
        queue.put(f"b{number}", B, 1.0)
    first = [queue.pop() for _ in range(22)]
    assert [item for item in first if item and item[0] == "a"] == ["a0"]
    assert queue.running(limited) == 1
    later = []
    for _ in range(10):
        if queue.running(limited):
            queue.release(limited)
        later.append(queue.pop())
    assert Counter(item[0] for item in later if item) == {"a": 5, "b": 5}


def test_what_comes_back_is_no_turn_saved_up() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("a", A, 10.0)
    queue.put("b", B, 1.0)
    for number in range(20):
        queue.put(f"a{number}", A, 1.0)
        queue.put(f"b{number}", B, 1.0)
    assert [queue.pop() for _ in range(7)] == ["a", "b", "b0", "b1", "b2", "b3", "b4"]
    queue.release(A, unused=10.0)
    assert Counter(item[0] for item in drain(queue)[:8]) == {"a": 4, "b": 4}


def test_what_no_longer_waits_is_gone_and_costs_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("a0", A, 100.0)
    queue.put("a1", A, 1.0)
    queue.put("b0", B, 1.0)
    assert queue.waiting(A) == 2
    assert queue.remove("a0") and not queue.remove("a0") and not queue.remove("never")
    assert (queue.waiting(A), len(queue)) == (1, 2)
    assert drain(queue) == ["a1", "b0"]
    assert len(queue) == 0


CLIENTS = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 2.0, 5.0]), st.sampled_from([None, 1, 3])), min_size=1, max_size=5
).map(lambda settings: [Client(str(number), None, 60.0, *of) for number, of in enumerate(settings)])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 99), st.floats(0.1, 20.0)),
        st.tuples(st.just("pop"), st.just(0), st.just(0.0)),
        st.tuples(st.just("release"), st.integers(0, 99), st.floats(0.0, 1.0)),
        st.tuples(st.just("remove"), st.integers(0, 99), st.just(0.0)),
    ),
    max_size=120,
)


@given(CLIENTS, STEPS)
def test_nothing_is_lost_limits_hold_and_nobody_waits_for_nothing(clients: list[Client], steps: list) -> None:
    queue: FairQueue[int] = FairQueue()
    waiting: dict[str, list[int]] = {client.name: [] for client in clients}
    running: list[tuple[Client, float]] = []
    owner: dict[int, tuple[Client, float]] = {}
    for number, (kind, which, value) in enumerate(steps):
        if kind == "put":
            client = clients[which % len(clients)]
            queue.put(number, client, value)
            waiting[client.name].append(number)
            owner[number] = client, value
        elif kind == "pop":
            taken = queue.pop()
            count = Counter(client.name for client, _ in running)
            able = [of for of in clients if waiting[of.name] and (of.max_running or 999) > count[of.name]]
            assert (taken is None) == (not able)
            if taken is not None:
                client, cost = owner[taken]
                assert client in able and waiting[client.name].pop(0) == taken
                running.append((client, cost))
        elif kind == "release" and running:
            client, cost = running.pop(which % len(running))
            queue.release(client, unused=value * cost)
        elif kind == "remove":
            there = [item for items in waiting.values() for item in items]
            if there:
                item = there[which % len(there)]
                waiting[owner[item][0].name].remove(item)
                assert queue.remove(item)
        count = Counter(client.name for client, _ in running)
        assert all(queue.running(client) == count[client.name] for client in clients)
        assert all(queue.waiting(client) == len(waiting[client.name]) for client in clients)
        assert len(queue) == sum(map(len, waiting.values()))


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=5),
    costs=st.lists(st.floats(0.1, 20.0), min_size=5, max_size=5),
    slots=st.integers(1, 4),
    before=st.integers(0, 4),
    random=st.integers(0, 2**32).map(Random),
)
def test_who_waits_gets_its_share(
    weights: list[float], costs: list[float], slots: int, before: int, random: Random
) -> None:
    clients = [Client(str(number), weight=weight) for number, weight in enumerate(weights)]
    queue: FairQueue[tuple[str, int]] = FairQueue()
    by_name = {client.name: client for client in clients}
    cost_of = {client.name: cost for client, cost in zip(clients, costs, strict=False)}
    for number in range(60):
        queue.put(("0", number), clients[0], cost_of["0"])
    running = ["0" for _ in range(min(before, slots)) if queue.pop()]  # before the others came
    for number in range(60):
        for client in clients[1:]:
            queue.put((client.name, number), client, cost_of[client.name])
    served = dict.fromkeys(by_name, 0.0)
    while all(queue.waiting(client) for client in clients):
        if len(running) == slots:
            queue.release(by_name[running.pop(random.randrange(slots))])
        item = queue.pop()
        assert item is not None
        running.append(item[0])
        served[item[0]] += cost_of[item[0]]
        for one, other in combinations(by_name, 2):
            lag = abs(served[one] / by_name[one].weight - served[other] / by_name[other].weight)
            assert lag <= cost_of[one] / by_name[one].weight + cost_of[other] / by_name[other].weight + 1e-6


def test_a_costly_request_does_not_starve() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("large", A, 1000.0)
    queue.put("larger", A, 1000.0)
    for number in range(1200):
        queue.put(f"b{number}", B, 1.0)
    order = drain(queue)
    assert order.index("large") == 0
    assert order.index("larger") == pytest.approx(1002, abs=2)
