"""Answers as bytes, for processes that follow the same sequences. Numbers arrive as they were: JSON writes every float
so that it is read back the same."""

import json
from collections.abc import Mapping
from typing import Any

from megatron_ee.inference.answers import Answer, Answers, Drafted, Passed, Said, Scored, Silence
from megatron_ee.inference.request import Emission, Logprobs
from megatron_ee.inference.work import Work

_COUNTERS = ("features", "feature_rows", "projections", "projected")


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def decode(data: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(data)
    return message


def answers_out(answers: Answers) -> list[Any]:
    return [[slot, *_answer_out(answer)] for slot, answer in answers.items()]


def answers_in(found: list[Any]) -> dict[int, Answer]:
    return {slot: _answer_in(kind, *of) for slot, kind, *of in found}


def work_out(work: Work, told: Work) -> list[Any]:
    """What heads have run since it was told; layers are counted by everybody. Now it is told."""
    news = []
    for name in _COUNTERS:
        counts, known = getattr(work, name), getattr(told, name)
        new = [(layer, count - known[layer]) for layer, count in counts.items() if count != known[layer]]
        known.update(dict(new))
        news.append(new)
    return news


def work_in(news: list[Any], *works: Work) -> None:
    """Add it to each of these."""
    for name, new in zip(_COUNTERS, news, strict=True):
        for work in works:
            getattr(work, name).update(dict(new))


def _answer_out(answer: Answer) -> list[Any]:
    match answer:
        case Passed(choice):
            return ["passed", choice]
        case Drafted(token):
            return ["drafted", token]
        case Said(emissions, accepted):
            return ["said", accepted, [_emission_out(of) for of in emissions]]
        case Scored(logprobs, then):
            return ["scored", [_out(of) for of in logprobs], None if then is None else _answer_out(then)]
    return ["silence"]


def _answer_in(kind: str, *of: Any) -> Answer:
    match kind:
        case "passed":
            return Passed(of[0])
        case "drafted":
            return Drafted(of[0])
        case "said":
            return Said(tuple(_emission_in(*emission) for emission in of[1]), of[0])
        case "scored":
            logprobs = tuple(Logprobs(token, dict(top)) for token, top in of[0])
            return Scored(logprobs, None if of[1] is None else _answer_in(*of[1]))
    return Silence()


def _emission_out(of: Emission) -> list[Any]:
    by_exit = None if of.exit_logprobs is None else [[layer, _out(one)] for layer, one in of.exit_logprobs.items()]
    return [of.token, of.exit_layer, of.confidence, _out(of.logprobs), by_exit, of.draft_exit, of.discarded]


def _emission_in(
    token: int, layer: int, confidence: float, logprobs: Any, by_exit: Any, draft_exit: int | None, discarded: int
) -> Emission:
    passed = None
    if by_exit is not None:
        passed = {layer: found for layer, of in by_exit if (found := _in(of)) is not None}
    return Emission(token, layer, confidence, _in(logprobs), passed, None, draft_exit, discarded)


def _out(of: Logprobs | None) -> list[Any] | None:
    return None if of is None else [of.token, [*of.top.items()]]


def _in(found: list[Any] | None) -> Logprobs | None:
    return None if found is None else Logprobs(found[0], dict(found[1]))
