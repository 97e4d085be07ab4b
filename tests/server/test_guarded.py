"""Keys, budgets and bounds, through the official client; and what the audit file notes of it."""

import json
from typing import Any

import httpx
import openai
import pytest
from helpers.servers import GuardedServer


def _client(guarded: GuardedServer, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guarded.server.url}/v1", api_key=key, max_retries=0)


def _noted(guarded: GuardedServer, event: str) -> list[dict[str, Any]]:
    events = map(json.loads, guarded.audit.read_text().splitlines())
    return [of for of in events if of["event"] == event]


def test_nobodys_key(guarded: GuardedServer) -> None:
    wrong = "ee-this-is-nobodys-key"
    client = _client(guarded, wrong)
    before = len(_noted(guarded, "invalid_api_key"))
    for ask in (lambda: client.completions.create(model="tiny", prompt="x"), client.models.list):
        with pytest.raises(openai.AuthenticationError) as refused:
            ask()
        assert refused.value.code == "invalid_api_key"
        assert refused.value.response.headers["www-authenticate"] == "Bearer"
    events = _noted(guarded, "invalid_api_key")[before:]
    assert [event["client"] for event in events] == ["", ""]
    assert wrong not in guarded.audit.read_text() + "\n".join(guarded.server.log)


def test_without_a_key_nothing_is_read(guarded: GuardedServer) -> None:
    """Neither what is wrong with a body is said, nor what there is; the page and the state of the server are open."""
    url = guarded.server.url
    for body in (b"{", b'{"model": 1}', b"a" * 10_000_000):
        assert httpx.post(f"{url}/v1/completions", content=body).status_code == 401
    assert httpx.get(f"{url}/v1/nothing").status_code == 401
    for path in ("/", "/health", "/ready", "/metrics"):
        assert httpx.get(url + path).status_code == 200


def test_a_key_opens(guarded: GuardedServer) -> None:
    before = guarded.server.metric("layer_tokens_total", client="a")
    answer = _client(guarded, guarded.keys["a"]).completions.create(
        model="tiny", prompt="x", max_tokens=4, extra_body={"early_exit": {"mode": "full"}}
    )
    depths = answer.choices[0].model_extra["early_exit"]["exit_layers"]  # type: ignore[index]
    assert guarded.server.metric("layer_tokens_total", client="a") - before == 8 + sum(depths)


def test_a_budget_that_is_used_up(guarded: GuardedServer) -> None:
    """2000 layer-tokens in ten minutes: of 8 layers, some 250 tokens."""
    client = _client(guarded, guarded.keys["poor"])
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 200}
    full = {"early_exit": {"mode": "full"}, "ignore_eos": True}
    answer = client.completions.create(**asked, extra_body=full)
    assert answer.usage is not None and answer.usage.completion_tokens == 200
    with pytest.raises(openai.RateLimitError) as over:
        client.completions.create(**asked, extra_body=full)
    assert over.value.code == "budget_exceeded" and "layer-tokens" in over.value.message
    assert 1 <= int(over.value.response.headers["retry-after"]) <= 600
    assert client.completions.create(model="tiny", prompt="x", max_tokens=4).choices[0].text, "what is left may be used"
    with pytest.raises(openai.BadRequestError) as never:
        client.completions.create(**{**asked, "max_tokens": 300}, extra_body=full)
    assert (never.value.code, never.value.param) == ("too_large_for_budget", "max_tokens")
    (noted,) = _noted(guarded, "budget_exceeded")
    assert (noted["client"], noted["field"]) == ("poor", None) and noted["request"].startswith("cmpl-")
    (noted,) = _noted(guarded, "too_large_for_budget")
    assert (noted["client"], noted["field"]) == ("poor", "max_tokens")
    others = _client(guarded, guarded.keys["a"]).completions.create(**asked)
    assert others.choices[0].finish_reason is not None, "another's budget is its own"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": [[1] * 2049]}, "prompt"),
        ({"extra_body": {"early_exit": {"mode": "speculative", "draft_length": 17}}}, "early_exit.draft_length"),
        ({"extra_body": {"early_exit": {"threshold": 0.001}}}, "early_exit.threshold"),
        ({"extra_body": {"early_exit": {"thresholds": {"2": 0.001}}}}, "early_exit.thresholds"),
    ],
)
def test_out_of_bounds(guarded: GuardedServer, asked: dict[str, Any], field: str) -> None:
    before = len(_noted(guarded, "out_of_bounds"))
    with pytest.raises(openai.BadRequestError) as refused:
        _client(guarded, guarded.keys["b"]).completions.create(**{"model": "tiny", "prompt": "x", **asked})
    error = refused.value
    assert error.code == "out_of_bounds" and error.param is not None and field in error.message
    assert error.param.startswith(field)
    (noted,) = _noted(guarded, "out_of_bounds")[before:]
    assert (noted["client"], noted["field"]) == ("b", error.param)


def test_keys_are_nowhere(guarded: GuardedServer) -> None:
    said = guarded.audit.read_text() + "\n".join(guarded.server.log)
    assert not [name for name, key in guarded.keys.items() if key in said]
