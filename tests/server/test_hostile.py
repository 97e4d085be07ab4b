"""Malformed and hostile requests: refused in words, and nothing of them is left."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import schemathesis
from helpers.hostile import RawClient, bodies, check_answer, head_of, leaving, odd_requests, post
from helpers.servers import RunningServer, start_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_REFERENCE = {"model": "tiny", "prompt": "some text", "max_tokens": 24, "temperature": 0.8, "seed": 3}
_SAMPLE, _WHOLE = 60, 1000


@pytest.fixture(scope="module")
def victim(checkpoint: Path) -> Iterator[RunningServer]:
    """A server whose patience is short."""
    running = start_server(checkpoint, "inference.max_batch_size=4", "serving.read_timeout=1.5", "serving.timeout=60.0")
    yield running
    assert running.end() == 0, "\n".join(running.log)


@pytest.fixture
def unharmed(victim: RunningServer) -> Iterator[RunningServer]:
    """It says what it said before, holds nothing, and has written no traceback."""
    before = _said(victim)
    yield victim
    victim.wait_until_idle()
    assert _said(victim) == before
    assert not [line for line in victim.log if "Traceback" in line], "\n".join(victim.log)


def _said(server: RunningServer) -> str:
    text: str = httpx.post(f"{server.url}/v1/completions", json=_REFERENCE, timeout=60).json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("count", [_SAMPLE, pytest.param(_WHOLE, marks=pytest.mark.slow)])
def test_wrong_values_are_refused_or_served(unharmed: RunningServer, count: int) -> None:
    outcomes = []
    for route, body in bodies(count, count):
        answer = post(unharmed.url + route, body)
        check_answer(answer)
        outcomes.append(answer.status_code)
    assert outcomes.count(400) > count / 3 and 200 in outcomes


def test_odd_requests_are_refused(unharmed: RunningServer) -> None:
    statuses = [answer.status_code for answer in odd_requests(unharmed.url) if check_answer(answer) is None]
    assert {400, 404, 405, 413} <= set(statuses)


def test_garbage_is_no_request(unharmed: RunningServer) -> None:
    for data in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n", b"\x00" * 5000, b"A" * 100_000):
        client = RawClient(unharmed.url)
        try:
            client.send(data)
            assert (client.read_status() or 400) in (400, 404)
        except ConnectionError:
            pass  # it did not even listen to the end
        finally:
            client.close()


def test_a_request_that_does_not_arrive_is_given_up(unharmed: RunningServer) -> None:
    client = RawClient(unharmed.url)
    client.send(head_of(100) + b'{"model": ')
    assert client.read_status() == 408
    client.close()


def test_a_body_without_a_length_is_measured_while_it_comes(unharmed: RunningServer) -> None:
    client = RawClient(unharmed.url)
    client.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n" % 2**20 + b" " * 2**20 + b"\r\n"
    try:
        for _ in range(4):
            client.send(chunk)
    except ConnectionError:
        pass
    assert client.read_status() == 413
    client.close()


@pytest.mark.slow
def test_a_client_that_does_not_read_loses_its_answer(unharmed: RunningServer) -> None:
    body = json.dumps(
        {"model": "tiny", "prompt": "x" * 900, "max_tokens": 512, "ignore_eos": True, "stream": True, "n": 16}
    ).encode()
    client = RawClient(unharmed.url)
    client.send(head_of(len(body)) + body)
    client.read_status()  # and no more
    unharmed.wait_until_idle(60)
    client.close()


def test_clients_that_leave_leave_nothing(unharmed: RunningServer) -> None:
    for seed in range(40):
        leaving(unharmed.url, seed)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_what_its_own_schema_allows(unharmed: RunningServer, count: int) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{unharmed.url}/openapi.json").json())
    strategies = [operation.ok().as_strategy() for operation in schema.get_all_operations()]

    @settings(max_examples=count, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.one_of(strategies))
    def ask(case: schemathesis.Case) -> None:
        answer = case.call(base_url=unharmed.url, timeout=60)
        assert answer.status_code < 500, f"{answer.status_code} {answer.text[:300]} to {case.as_curl_command()}"

    ask()


@pytest.mark.slow
def test_memory_comes_back_to_its_level(unharmed: RunningServer) -> None:
    process = psutil.Process(unharmed.process.pid)

    def attack(seed: int) -> None:
        for route, body in bodies(seed, 150):
            check_answer(post(unharmed.url + route, body))
        for number in range(30):
            leaving(unharmed.url, 1000 * seed + number)
        for answer in odd_requests(unharmed.url):
            check_answer(answer)
        unharmed.wait_until_idle()
        time.sleep(2)

    attack(1)
    attack(2)
    level, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    for seed in range(3, 8):
        attack(seed)
    grown = process.memory_info().rss - level
    assert grown < 40 * 2**20, f"{grown / 2**20:.0f} MB more, of {level / 2**20:.0f}"
    assert process.num_fds() <= files + 2 and process.num_threads() <= threads + 2
