"""Alarms: quiet under loads as they come, and soon about attacks; on a simulated clock."""

import math

import numpy as np
import pytest
from helpers.simulated_load import HOUR, SimulatedClient, anybodys, send, serve
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import AlarmsConfig, ExitParams
from megatron_ee.server.guard.alarms import Alarm, Alarms, compare
from megatron_ee.server.guard.evidence import RUN_LENGTH, Evidence, Shares

EXITS = (3, 6, 9)


def alarms(**settings: float) -> Alarms:
    return Alarms(AlarmsConfig.model_validate(settings))


def tell(watch: Alarms, client: str, shares: list[float], *, tokens: int = 100, now: float = 0.0) -> None:
    for share in shares:
        watch.saw(client, early=round(share * tokens), tokens=tokens, drafted=0, accepted=0, now=now)


USUAL = [0.5, 0.4, 0.6, 0.45, 0.55, 0.7, 0.3, 0.5]


@pytest.mark.parametrize("num_clients", [*(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4)), 2, 12])
def test_no_alarm_under_normal_load(num_clients: int) -> None:
    """Twenty hours each: clients of their own difficulty, lengths with heavy tails, some that ask for full depth."""
    for seed in range(10):
        random = np.random.default_rng([num_clients, seed])
        share = float(random.choice([0.25, 0.5, 0.8]))
        clients = [anybodys(str(number), random, share=share) for number in range(num_clients)]
        assert serve(alarms(), clients, 2.0, random) == []


def detected_after(seed: int, *, num_clients: int, most: int, **attack: float) -> int:
    """Requests of a client that begins when others are known, until there is an alarm about it."""
    random, watch = np.random.default_rng([7, seed]), alarms()
    clients = [anybodys(str(number), random) for number in range(num_clients)]
    for client in clients:
        client.full = client.drafting = 0.0
    serve(watch, clients, 0.3, random)
    attacker = SimulatedClient("attacker", **attack)
    for number in range(most):
        now = HOUR + 10.0 * number
        send(watch, attacker, now, random)
        for client in clients:
            if random.random() < client.rate / 360:
                send(watch, client, now, random)
        if any(alarm.client == "attacker" for alarm in watch.active(now)):
            return number + 1
    return most + 1


def test_a_slowdown_client_is_caught_within_two_windows_or_three() -> None:
    """A hundred of them, beside few clients and many."""
    took = [detected_after(seed, num_clients=3 + seed % 5, most=128, share=0.01) for seed in range(100)]
    assert np.median(took) <= 64
    assert np.quantile(took, 0.95) <= 96


def test_whose_drafts_are_never_accepted_is_caught() -> None:
    watch = alarms()
    for _ in range(40):
        for client, accepted in (("a", 70), ("b", 60), ("c", 75)):
            watch.saw(client, early=0, tokens=100, drafted=100, accepted=accepted, now=0.0, compared=None)
    for _ in range(64):
        watch.saw("d", early=0, tokens=100, drafted=100, accepted=2, now=5.0, compared=None)
    assert [(alarm.kind, alarm.client, alarm.since, alarm.value) for alarm in watch.active(5.0)] == [
        ("acceptance", "d", 5.0, pytest.approx(0.02))
    ]


def test_full_depth_by_choice_is_no_collapse() -> None:
    watch = alarms()
    tell(watch, "a", USUAL * 10)
    for _ in range(500):
        watch.saw("b", early=0, tokens=100, drafted=0, accepted=0, now=0.0, compared=None)
    assert watch.active(0.0) == []


def test_an_alarm_stays_until_a_window_is_as_usual() -> None:
    watch = alarms()
    for client in "abc":
        tell(watch, client, USUAL * 10)
    tell(watch, "d", [0.0] * 64, now=1.0)
    assert [alarm.client for alarm in watch.active(1.0)] == ["d"]
    tell(watch, "d", USUAL * 2, now=2.0)
    (alarm,) = watch.active(2.0)
    assert (alarm.since, alarm.value) == (1.0, pytest.approx(0.25))  # half of a window of each
    tell(watch, "d", USUAL * 4, now=3.0)
    assert watch.active(3.0) == []
    tell(watch, "d", [0.0] * 80, now=4.0)
    assert [alarm.since for alarm in watch.active(4.0)] == [4.0]
    assert watch.active(4.0 + HOUR / 2) != []
    assert watch.active(4.0 + 2 * HOUR) == []  # it has gone away


def test_an_alarmed_client_is_no_measure_of_others() -> None:
    watch = alarms()
    tell(watch, "a", USUAL * 10)
    tell(watch, "b", [0.0] * 120)
    tell(watch, "c", [0.0] * 120)
    assert {alarm.client for alarm in watch.active(0.0)} == {"b", "c"}
    assert all(alarm.reference == pytest.approx(0.5) for alarm in watch.active(0.0))


def test_where_clients_differ_widely_a_low_one_is_no_collapse() -> None:
    for others, found in (({"a": 0.3, "b": 0.9}, []), ({"a": 0.6, "b": 0.6}, ["c"])):  # of the same median
        watch = alarms()
        for _ in range(600):
            for client, share in {**others, "c": 0.15}.items():
                tell(watch, client, [share])
        assert [alarm.client for alarm in watch.active(0.0)] == found


@pytest.mark.parametrize("window", [32, 128])
def test_an_alarm_lasts_a_window_at_least(window: int) -> None:
    watch = alarms(window=window)
    for client in "abc":
        tell(watch, client, USUAL * 20)
    tell(watch, "d", [1.0] * 100)
    while not watch.active(0.0):
        tell(watch, "d", [0.0])
    tell(watch, "d", [1.0] * (window - 1))
    assert [alarm.client for alarm in watch.active(0.0)] == ["d"]
    tell(watch, "d", [1.0])
    assert watch.active(0.0) == []


def test_short_requests_do_not_hide_long_ones() -> None:
    watch = alarms()
    for client in "abc":
        tell(watch, client, USUAL * 10)
    for _ in range(80):
        tell(watch, "d", [1.0] * 10, tokens=1)
        tell(watch, "d", [0.0], tokens=1000)
    assert [alarm.client for alarm in watch.active(0.0)] == ["d"]


def test_everybody_is_held_against_their_own_past() -> None:
    watch = alarms()
    for _ in range(100):
        for client, share in (("a", 0.7), ("b", 0.4), ("c", 0.3)):
            tell(watch, client, [share])
    for _ in range(300):  # another mix is no alarm
        tell(watch, "c", [0.3])
    assert watch.active(0.0) == []
    for _ in range(25):
        for client in "abc":
            tell(watch, client, [0.02], now=9.0)
    about = [(alarm.kind, alarm.client, alarm.since) for alarm in watch.active(9.0)]
    assert ("exit_rate", None, 9.0) in about


def test_one_client_alone_has_its_past() -> None:
    watch = alarms()
    tell(watch, "a", USUAL * 30)
    tell(watch, "a", [0.0] * 64)
    assert [alarm.client for alarm in watch.active(0.0)] == [None]
    unknown = alarms()
    tell(unknown, "a", [0.0] * 500)
    assert unknown.active(0.0) == []


def test_who_lets_tokens_out_more_easily_is_watched_and_is_no_measure() -> None:
    watch = alarms()
    for _ in range(100):
        for client in "abc":
            watch.saw(client, early=95, tokens=100, drafted=0, accepted=0, now=0.0, compared="easier")
    tell(watch, "d", [0.1] * 300)
    assert watch.active(0.0) == []  # others' easier settings say nothing of what is usual
    for client in "efg":
        tell(watch, client, USUAL * 10)
    for _ in range(100):
        watch.saw("h", early=0, tokens=100, drafted=0, accepted=0, now=0.0, compared="easier")
    assert "h" in {alarm.client for alarm in watch.active(0.0)}


@pytest.mark.parametrize(
    ("exit", "own", "found"),
    [
        ({}, {}, "own"),
        ({"mode": "full"}, {}, None),
        ({"mode": "speculative"}, {}, None),
        ({"threshold": 1.0}, {}, None),
        ({"threshold": 0.95}, {}, None),
        ({"threshold": 0.8}, {}, "easier"),
        ({"thresholds": {6: 0.99}}, {}, None),
        ({"thresholds": {6: 0.5}}, {}, "easier"),
        ({"exits": [9]}, {}, None),
        ({"min_exit": 4}, {}, None),
        ({}, {"min_exit": 4}, "easier"),
        ({"patience": 2}, {}, None),
        ({}, {"patience": 2}, "easier"),
        ({"measure": "margin"}, {}, None),
        ({"kv_policy": "fill", "max_pending": 9}, {}, "own"),
        ({}, {"mode": "full"}, "own"),
    ],
)
def test_whose_tokens_leave_as_easily(exit: dict, own: dict, found: str | None) -> None:
    assert compare(ExitParams.model_validate(exit), ExitParams.model_validate(own), EXITS) == found


def agreements(mean: float, count: int, random: np.random.Generator) -> list[tuple[int, int]]:
    shares = random.beta(mean * 12, (1 - mean) * 12, count)
    tokens = random.integers(20, 200, count)
    return [(int(random.binomial(whole, share)), int(whole)) for share, whole in zip(shares, tokens, strict=True)]


def test_drift_is_caught_and_only_drift() -> None:
    took = []
    for seed in range(50):
        random, watch = np.random.default_rng(seed), alarms()
        for part, whole in agreements(0.97, 2000, random):
            watch.judged(part, whole, 0.0)
        assert watch.active(0.0) == []
        for number, (part, whole) in enumerate(agreements(0.8, 200, random), 1):
            watch.judged(part, whole, float(number))
            if found := watch.active(0.0):
                took.append(number)
                assert found[0].kind == "agreement" and found[0].since == number and found[0].reference == 0.9
                break
        for part, whole in agreements(0.97, 200, random):
            watch.judged(part, whole, 0.0)
        assert watch.active(0.0) == []
    assert len(took) == 50
    assert np.quantile(took, 0.95) <= 96


def test_few_answers_near_the_limit_are_no_drift() -> None:
    for seed in range(100):
        random, watch = np.random.default_rng(seed), alarms()
        for part, whole in agreements(0.89, 40, random):
            watch.judged(part, whole, 0.0)
        assert watch.active(0.0) == []


def test_evidence_of_a_mean_at_its_limit_comes_as_seldom_as_it_is_said() -> None:
    """A stake of c is reached within n observations with a probability of n / c at most; and not for want of trying."""
    random = np.random.default_rng(1)
    alarmed = 0
    for _ in range(400):
        evidence = Evidence()
        for share in random.beta(0.5 * 4, 0.5 * 4, 250):
            evidence.see(float(share), 0.5)
        alarmed += evidence.is_strong
    assert alarmed / 400 <= 250 / RUN_LENGTH + 0.01


def test_evidence_grows_by_the_bets_and_begins_anew() -> None:
    evidence = Evidence()
    for _ in range(100):
        evidence.see(1.0, 0.5)
    steps = 0
    while not evidence.is_strong:
        evidence.see(0.0, 0.5)
        steps += 1
    assert steps == math.ceil(math.log(RUN_LENGTH * 3) / math.log(1.9))
    evidence.forget()
    assert not evidence.is_strong


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), max_size=50))
def test_no_share_and_no_limit_breaks_evidence(seen: list[tuple[float, float]]) -> None:
    evidence = Evidence()
    for share, limit in seen:
        evidence.see(share, limit)
        assert evidence.is_strong in (True, False)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=60))
def test_every_token_is_in_one_observation(requests: list[tuple[int, int]]) -> None:
    shares = Shares(window=1000, unit=64)
    part = whole = 0
    for one, other in requests:
        early, tokens = min(one, other), max(one, other)
        part, whole = part + early, whole + tokens
        found = shares.add(early, tokens, is_reference=True)
        assert (found is not None) == (whole >= 64)
        if found is not None:
            assert found == (part / whole, True)
            part = whole = 0


def test_an_alarm_names_what_it_is_about() -> None:
    watch = alarms(exit_rate=0.5)
    for client in "abc":
        tell(watch, client, USUAL * 10)
    tell(watch, "d", [0.0] * 64, now=3.0)
    (alarm,) = watch.active(3.0)
    assert alarm == Alarm("exit_rate", "d", 3.0, 0.0, pytest.approx(0.5))


def test_what_is_partly_others_measure_is_none() -> None:
    shares = Shares(window=4, unit=64)
    assert shares.add(10, 10, is_reference=False) is None
    assert shares.add(54, 54, is_reference=True) == (1.0, False)
    assert shares.add(64, 64, is_reference=True) == (1.0, True)
