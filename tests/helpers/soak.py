"""A mixed load: clients that ask for all kinds of things at once, leave, or ask for what nobody gets; and what they
know of it in the end, to be held against what the server says of itself.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from helpers.hostile import MODEL, RawClient, head_of
from helpers.servers import RunningServer
from helpers.tallies import Heard, Tally, streamed_choices, whole_choices

DEADLINE = 60.0
"""Seconds in which every request has to end, in whatever way."""
TIMEOUT = 3.0
"""The server's own, which only answers that are too long for it reach."""
MODES: list[dict[str, Any]] = [
    {},
    {"mode": "full"},
    {"threshold": 0.02, "kv_policy": "fill", "max_pending": 3},
    {"thresholds": {"2": 1, "5": 0.014}, "kv_policy": "propagate"},
    {"mode": "speculative", "draft_exit": 5, "draft_length": 3},
    {"mode": "speculative", "kv_policy": "fill"},
    {"mode": "sled"},
    {"mode": "dola", "dola": {"layers": [5]}},
]
_BAD: list[dict[str, Any]] = [
    {"temperature": -1},
    {"max_tokens": 10_000},
    {"n": 1000},
    {"treshold": 1},
    {"early_exit": {"treshold": 1}},
    {"early_exit": {"exits": [3]}},
    {"model": "other"},
    {"top_p": "1"},
]
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}
_LONG = {"prompt": "x", "max_tokens": 512, "ignore_eos": True, "early_exit": {"mode": "full"}}
_CHANGES_NOTHING = {"stream", "stream_options", "logprobs", "top_logprobs"}


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        is_settled: there is one answer only.
    """

    is_chat: bool
    body: dict[str, Any]
    is_settled: bool

    @property
    def route(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"


def draw_case(draw: random.Random) -> Case:
    """Short; many are one of a few questions, asked again and again."""
    if draw.random() < 0.4:
        streams = _STREAM if draw.random() < 0.6 else {}
        asked = {"model": MODEL, "prompt": "some text", "max_tokens": 12, "temperature": 0}
        return Case(False, {**asked, "early_exit": draw.choice(MODES), **streams}, True)
    is_chat, streams, is_greedy = draw.random() < 0.4, draw.random() < 0.6, draw.random() < 0.6
    body: dict[str, Any] = {"model": MODEL, "max_tokens": draw.choice((4, 12)), "early_exit": draw.choice(MODES)}
    body |= {"temperature": 0} if is_greedy else {"temperature": 1.0, "top_p": 0.9}
    body |= _STREAM if streams else {}
    if draw.random() < 0.3:
        body["n"] = 2
    has_seed = draw.random() < 0.5
    if has_seed:
        body["seed"] = draw.randrange(2)
    text = draw.choice(("some text", "early exits let a token leave"))
    if is_chat:
        body["messages"] = [{"role": "user", "content": text}]
        body |= {"logprobs": True, "top_logprobs": 2} if draw.random() < 0.3 else {}
        return Case(True, body, is_greedy or has_seed)
    body["prompt"] = draw.choice((text, [text, "other"], [3, 1, 4]))
    if draw.random() < 0.3:
        body["logprobs"] = 2
    if draw.random() < 0.3:
        body["echo"] = True
        body["max_tokens"] = draw.choice((0, body["max_tokens"]))
    return Case(False, body, is_greedy or has_seed)


class Visitor:
    """One client: a thread's."""

    def __init__(self, url: str, key: str, seed: int) -> None:
        self.tally = Tally()
        self._url, self._key, self._draw = url, key, random.Random(seed)
        self._client = httpx.Client(base_url=url, timeout=DEADLINE, headers={"Authorization": f"Bearer {key}"})

    def close(self) -> None:
        self._client.close()

    def visit(self, until: float, *, leaves: bool) -> None:
        while time.monotonic() < until:
            began, kind = time.monotonic(), self._draw.random()
            if leaves and kind < 0.2:
                self._leave()
            elif kind < 0.3:
                self._ask(Case(False, {"model": MODEL, "prompt": "x", **self._draw.choice(_BAD)}, False))
            else:
                self._ask(draw_case(self._draw))
            if time.monotonic() - began > DEADLINE:
                self.tally.faults.append("a request took too long")

    def spend(self) -> None:
        """Ask for more than its budget of 4000 layer-tokens: of this model's 8 layers, for 500 tokens."""
        body = {"model": MODEL, **_LONG, "max_tokens": 400}
        with self._client.stream("POST", "/v1/completions", json={**body, **_STREAM}) as answer:
            self._ask(Case(False, body, False))
            self._ask(Case(False, {**body, "max_tokens": 512}, False))
            self._hear(Case(False, body, False), answer)

    def ask_badly(self) -> None:
        for wrong in _BAD:
            self._ask(Case(False, {"model": MODEL, "prompt": "x", **wrong}, False))
        body, nobodys = {"model": MODEL, "prompt": "x"}, {"Authorization": "Bearer nobody's"}
        self._refused(httpx.post(f"{self._url}/v1/completions", json=body, headers=nobodys))

    def crowd(self, until: float, begun: threading.Event) -> None:
        """Ask for more than there is time for, and then for more than may wait. Its key runs one text at a time."""
        body = {"model": MODEL, **_LONG}
        while time.monotonic() < until:
            with self._client.stream("POST", "/v1/completions", json={**body, **_STREAM, "n": 8}) as answer:
                self._ask(Case(False, {**body, "n": 8}, False))
                begun.set()
                self._hear(Case(False, body, False), answer)
            time.sleep(0.5)

    def _ask(self, case: Case) -> None:
        if not case.body.get("stream"):
            answer = self._client.post(case.route, json=case.body)
            if answer.status_code != 200:
                self._refused(answer)
                return
            self._take(case, whole_choices(answer.json()), answer.json()["usage"])
            return
        with self._client.stream("POST", case.route, json=case.body) as answer:
            self._hear(case, answer)

    def _hear(self, case: Case, answer: httpx.Response) -> None:
        """A stream, to its end."""
        if answer.status_code != 200:
            answer.read()
            self._refused(answer)
            return
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        pieces = [json.loads(event) for event in events if event != "[DONE]"]
        choices, usage = streamed_choices([piece for piece in pieces if "error" not in piece])
        if events[-1] == "[DONE]":
            self._take(case, choices, usage)
            return
        self._count(choices)
        self._failed(pieces[-1]["error"])

    def _take(self, case: Case, choices: Mapping[int, Heard], usage: Mapping[str, Any] | None) -> None:
        """An answer that is whole: is it?"""
        tally, body = self.tally, case.body
        prompt = body.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else 1
        expected = prompts * body.get("n", 1)
        if sorted(choices) != list(range(expected)):
            tally.faults.append(f"choices {sorted(choices)} for {body}")
            return
        for choice in choices.values():
            is_hidden = body.get("max_tokens") == 0
            tally.unseen += is_hidden
            if choice.finish not in ("stop", "length") or not (choice.layers or is_hidden):
                tally.faults.append(f"no whole answer: {choice} for {body}")
            if not len(choice.layers) == choice.confidences <= body.get("max_tokens", 512):
                tally.faults.append(f"tokens without depths: {choice} for {body}")
        tokens = sum(len(choice.layers) for choice in choices.values())
        if usage is None or usage["completion_tokens"] != tokens:
            tally.faults.append(f"{tokens} tokens, but {usage} for {body}")
        else:
            details = usage["completion_tokens_details"]
            tally.accepted += details["accepted_prediction_tokens"]
            tally.drafted += details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
        self._count(choices)
        tally.outcomes[choices[expected - 1].finish or ""] += 1
        if case.is_settled:
            question = json.dumps({name: body[name] for name in sorted(body.keys() - _CHANGES_NOTHING)})
            if body.get("echo") and "logprobs" in body:
                question += " after a scored prompt"  # which runs to full depth, as does the first new token
            tally.asked[question] += 1
            tally.said[question].add(json.dumps([(of.text, of.layers) for _, of in sorted(choices.items())]))

    def _count(self, choices: Mapping[int, Heard]) -> None:
        for choice in choices.values():
            self.tally.layers.update(choice.layers)

    def _refused(self, answer: httpx.Response) -> None:
        error = answer.json()["error"]
        if answer.status_code == 503:
            self._failed(error)
            return
        if not 400 <= answer.status_code < 500 or not error["message"]:
            self.tally.faults.append(f"{answer.status_code} {answer.text[:300]}")
        if answer.status_code == 429 and int(answer.headers["retry-after"]) < 1:
            self.tally.faults.append(f"429 without a time: {answer.headers}")
        self.tally.refused[error["code"] or str(answer.status_code)] += 1

    def _failed(self, error: Mapping[str, Any]) -> None:
        if error["code"] != "timeout":
            self.tally.faults.append(f"failed: {error}")
        self.tally.outcomes["timeout"] += 1

    def _leave(self) -> None:
        """Before, while or after the answer begins; or in the middle of the request."""
        self.tally.left += 1
        streams, draw = self._draw.random() < 0.7, self._draw
        body = {"model": MODEL, **_LONG, "max_tokens": 200, "n": draw.choice((1, 2)), "stream": streams}
        if streams and draw.random() < 0.5:
            with self._client.stream("POST", "/v1/completions", json=body) as answer:
                for _, _ in zip(range(draw.randrange(6)), answer.iter_lines(), strict=False):
                    pass
            return
        data = json.dumps(body).encode()
        head = head_of(len(data)).replace(b"Host:", f"Authorization: Bearer {self._key}\r\nHost:".encode(), 1)
        raw = RawClient(self._url)
        raw.send((head + data)[: draw.choice((draw.randrange(1, len(head + data)), None))])
        time.sleep(draw.choice((0.0, 0.05)))
        raw.close()


def run_load(server: RunningServer, keys: Mapping[str, str], seconds: float, *, leaves: bool, seed: int = 0) -> Tally:
    """
    Args:
        keys: by client: `free`, `limited` (with a budget) and `patient` (one text at a time).
        leaves: some leave, and some ask for too much; otherwise whoever asks hears the end.
    """
    names = ("free", "free", "free", "limited")
    visitors = [Visitor(server.url, keys[name], seed + number) for number, name in enumerate(names)]
    until, works = time.monotonic() + seconds, []
    if leaves:  # nobody else is there yet, so that it is certain what they get
        visitors[-1].spend()
        visitors[0].ask_badly()
        crowd, begun = Visitor(server.url, keys["patient"], seed), threading.Event()
        works.append(_begin(crowd, partial(crowd.crowd, until, begun)))
        begun.wait(DEADLINE)
    works += [_begin(visitor, partial(visitor.visit, until, leaves=leaves)) for visitor in visitors]
    tally = Tally()
    for thread, visitor in works:
        thread.join(seconds + 2 * DEADLINE)
        assert not thread.is_alive(), "a request hangs"
        tally.add(visitor.tally)
    return tally


def _begin(visitor: Visitor, work: Callable[[], None]) -> tuple[threading.Thread, Visitor]:
    """In a thread, whose errors are the test's."""

    def run() -> None:
        try:
            work()
        except Exception as error:  # of whatever kind: it is told
            visitor.tally.faults.append(repr(error))
        finally:
            visitor.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, visitor
