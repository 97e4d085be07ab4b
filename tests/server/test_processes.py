"""A model held by several processes answers as one process does, and ends as one."""

import sys
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


def _answers(server: RunningServer) -> list[Any]:
    answers = []
    for asked in _ASKED:
        body = {"model": "tiny", "max_tokens": 12, **asked}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        answers.append([(choice["text"], choice["early_exit"]["exit_layers"]) for choice in answer["choices"]])
    return answers


@pytest.mark.parametrize(
    ("processes", "stages"),
    [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_several_processes_answer_as_one(server: RunningServer, checkpoint: Path, processes: int, stages: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "megatron_ee.server", "--model", str(checkpoint)]
    settings = [f"inference.parallel.pipeline={stages}", "inference.max_batch_size=4"]
    several = start_server(checkpoint, *settings, command=command)
    try:
        assert _answers(several) == _answers(server)
        assert several.process.poll() is None
    finally:
        several.process.terminate()
        several.process.wait(60)
    assert any("no more requests are taken in" in line for line in several.log)
    assert not any("File" in line and "megatron_ee" in line for line in several.log), "\n".join(several.log)
