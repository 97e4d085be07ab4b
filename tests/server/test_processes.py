"""A model held by several processes answers as one process does, and ends as one."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.servers import RunningServer, start_server

_ASKED: list[dict[str, Any]] = [
    {"prompt": "some text", "temperature": 0},
    {"prompt": ["a", "b c"], "temperature": 0.9, "seed": 5, "n": 2},
    {"prompt": "x", "early_exit": {"mode": "speculative", "draft_exit": 5, "draft_length": 3}, "temperature": 0},
    {"prompt": "some text", "echo": True, "logprobs": 2, "temperature": 0},
    {"prompt": "x" * 1500, "temperature": 0, "early_exit": {"kv_policy": "fill"}},
    {"prompt": "y", "temperature": 0, "early_exit": {"mode": "sled"}},
]
_SHAPES = [(2, 2), pytest.param((2, 1), marks=pytest.mark.slow), pytest.param((4, 2), marks=pytest.mark.slow)]
"""Processes, and stages."""


@pytest.fixture(params=_SHAPES, ids=["stages", "shared-matrices", "both"])
def several(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[RunningServer]:
    """As torchrun starts them."""
    processes, stages = request.param
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "megatron_ee.server", "--model", str(checkpoint)]
    settings = [f"inference.parallel.pipeline={stages}", "inference.parallel.timeout=5.0"]
    running = start_server(checkpoint, *settings, "inference.max_batch_size=4", command=command)
    yield running
    running.process.kill()
    running.process.wait()


def _answers(server: RunningServer) -> list[Any]:
    answers = []
    for asked in _ASKED:
        body = {"model": "tiny", "max_tokens": 12, **asked}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        answers.append([(choice["text"], choice["early_exit"]["exit_layers"]) for choice in answer["choices"]])
    return answers


def _listen(url: str, told: list[str]) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4096, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        told.extend(line for line in answer.iter_lines() if line)


@pytest.mark.slow
def test_several_processes_answer_as_one_and_are_lost_as_one(several: RunningServer, server: RunningServer) -> None:
    assert _answers(several) == _answers(server)
    told: list[str] = []
    listening = threading.Thread(target=_listen, args=(several.url, told))
    listening.start()
    while not several.metric("num_requests_running"):
        time.sleep(0.01)
    parent = ["pgrep", "-P", str(several.process.pid)]
    *_, last = subprocess.run(parent, capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["kill", "-KILL", last], check=True)
    listening.join(60)
    assert "error" in json.loads(told[-1].removeprefix("data: "))
    assert several.process.wait(60) != 0
    assert not any("File" in line and "megatron_ee" in line for line in several.log), "\n".join(several.log)


@pytest.mark.slow
def test_several_processes_end_as_one(several: RunningServer) -> None:
    several.process.terminate()
    several.process.wait(60)
    several.wait_for("no more requests are taken in")
    assert not any("File" in line and "megatron_ee" in line for line in several.log), "\n".join(several.log)
