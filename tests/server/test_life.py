"""How a server begins and ends: what it says when something is wrong, and what becomes of answers under way."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers.servers import SETTINGS, RunningServer, start_server

_ENDLESS = {"model": "tiny", "prompt": "x", "max_tokens": 512, "ignore_eos": True, "stream": True}


@pytest.fixture
def own(checkpoint: Path) -> Iterator[RunningServer]:
    """A server to end."""
    running = start_server(checkpoint, "inference.max_batch_size=2", "serving.drain=20.0")
    yield running
    running.process.kill()
    running.process.wait()


def _tell(url: str, told: list[str], **asked: object) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json={**_ENDLESS, **asked}, timeout=60) as answer:
        told.extend(line for line in answer.iter_lines() if line)


def _begin(url: str, count: int, **asked: object) -> tuple[list[threading.Thread], list[list[str]]]:
    texts: list[list[str]] = [[] for _ in range(count)]
    threads = [threading.Thread(target=_tell, args=(url, told), kwargs=asked) for told in texts]
    for thread in threads:
        thread.start()
    return threads, texts


def _wait_until(holds: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_lets_answers_end_and_takes_in_no_more(own: RunningServer) -> None:
    threads, texts = _begin(own.url, 3)  # one of them waits for a place
    _wait_until(lambda: (own.metric("num_requests_running"), own.metric("num_requests_waiting")) == (2, 1))
    own.process.send_signal(signal.SIGTERM)
    own.wait_for("SIGTERM: no more requests are taken in")
    refused = httpx.post(f"{own.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) >= 1
    assert httpx.get(f"{own.url}/ready").status_code == 503
    assert httpx.get(f"{own.url}/health").status_code == 200
    for thread in threads:
        thread.join(60)
    assert [told[-1] for told in texts] == ["data: [DONE]"] * 3
    assert own.process.wait(20) == 0


@pytest.mark.slow
def test_a_second_signal_ends_answers_with_an_error(own: RunningServer) -> None:
    threads, texts = _begin(own.url, 3)
    _wait_until(lambda: (own.metric("num_requests_running"), own.metric("num_requests_waiting")) == (2, 1))
    own.process.send_signal(signal.SIGTERM)
    own.wait_for("no more requests")
    own.process.send_signal(signal.SIGINT)
    assert own.process.wait(20) == 0
    for thread in threads:
        thread.join(20)
    for told in texts:
        assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"


def _fails(*arguments: str) -> str:
    """What a server says that does not begin."""
    command = [sys.executable, "-m", "megatron_ee.server", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_port_that_is_taken(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = _fails("--model", str(checkpoint), *SETTINGS, f"serving.port={port}")
    assert "serving.port" in said and str(port) in said
