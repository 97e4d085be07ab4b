"""Prompts crafted so that nothing leaves early, and answers that full depth would not give: both are noticed."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.prompts import NEW_TOKENS, Found, find_prompts
from helpers.servers import GuardedServer, RunningServer, start_server

from megatron_ee.config import AlarmsConfig

_WINDOW = 8


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> Found:
    found = find_prompts(checkpoint)
    assert found.normal_share > 0.45 and found.slow_share < 0.06, f"{found}: another model than this is meant for"
    return found


def _ask(server: RunningServer, prompts: list[str], key: str = "", **asked: Any) -> None:
    body = {"model": "tiny", "prompt": prompts, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, **asked}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text


def _ask_often(server: RunningServer, prompts: list[str], key: str, times: int) -> None:
    for _ in range(times):
        _ask(server, prompts, key)


@pytest.mark.slow
def test_a_client_with_slowdown_prompts_is_noticed_and_no_other(guarded: GuardedServer, prompts: Found) -> None:
    server, keys = guarded.server, guarded.keys
    asked = dict.fromkeys(("a", "b", "c"), prompts.normal) | {"slow": prompts.slow}
    threads = [
        threading.Thread(target=_ask_often, args=(server, of, keys[name], 5 if name == "slow" else 2))
        for name, of in asked.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _wait_for_alarm(server, "exit_rate", lambda: _ask(server, prompts.slow, keys["slow"]))
    assert server.metric("alarms", kind="exit_rate", client="slow") == 1
    assert server.metric("alarms") == 1, "others have one, too"
    assert server.wait_for("alarm: exit_rate of slow")
    text = guarded.audit.read_text()
    (alarm,) = [event for event in map(json.loads, text.splitlines()) if event["event"] == "alarm"]
    assert (alarm["client"], alarm["kind"]) == ("slow", "exit_rate")
    assert alarm["value"] < 0.1 < 0.45 < alarm["reference"]
    said = text + "\n".join(server.log)
    for secret in (*prompts.normal, *prompts.slow, *keys.values()):
        assert secret not in said and json.dumps(secret)[1:-1] not in said


def _wait_for_alarm(server: RunningServer, kind: str, again: Any, times: int = 12) -> None:
    """More requests, until they are enough."""
    for _ in range(times):
        if server.metric("alarms", kind=kind):
            return
        again()
    assert server.metric("alarms", kind=kind), f"no alarm about {kind}: {server.log}"


@pytest.fixture
def shadowed(checkpoint: Path, tmp_path: Path) -> Iterator[RunningServer]:
    settings = ["serving.shadow=1.0", f"serving.alarms.window={_WINDOW}", f"serving.audit={tmp_path / 'audit'}"]
    running = start_server(checkpoint, "inference.max_batch_size=4", *settings, "inference.exit.threshold=0.0")
    yield running
    assert running.end() == 0, "\n".join(running.log)


@pytest.mark.slow
def test_answers_that_full_depth_would_not_give_are_noticed(shadowed: RunningServer, tmp_path: Path) -> None:
    texts = ["some text", "early exits", "let a token", "leave"]
    for exit in ({"mode": "full"}, {"threshold": 1.0}, {"mode": "speculative", "draft_exit": 2}):
        _ask(shadowed, texts, max_tokens=24, early_exit=exit)
    shadowed.wait_until_idle()
    assert shadowed.metric("shadow_tokens_total") == 0, "nothing has left early, and nothing is to be judged"
    assert shadowed.metric("alarms") == 0

    def again() -> None:
        before = shadowed.metric("shadow_tokens_total")
        _ask(shadowed, texts, max_tokens=24)
        deadline = time.monotonic() + 20
        while shadowed.metric("shadow_tokens_total") == before:
            assert time.monotonic() < deadline, "nothing is judged"
            time.sleep(0.05)

    _wait_for_alarm(shadowed, "agreement", again)
    assert 0 <= shadowed.metric("shadow_agreement_ratio") < AlarmsConfig().agreement
    assert '"kind": "agreement"' in (tmp_path / "audit").read_text()
    assert shadowed.metric("alarms") == 1
