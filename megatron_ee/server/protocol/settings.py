"""From the words of a request to `SamplingParams` and `ExitParams`: the server's own, with what the request says."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.config.fields import Section
from megatron_ee.errors import did_you_mean
from megatron_ee.server.protocol.errors import invalid
from megatron_ee.server.protocol.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "min_tokens": "min_new_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}
"""A request's field -> ours, where their values are the same."""

_THEIRS = {**{ours: theirs for theirs, ours in _NAMES.items()}, "max_new_tokens": "max_tokens"}

Params = TypeVar("Params", bound=Section)


def sampling_of(request: GenerationRequest, default: SamplingParams, *, most_tokens: int) -> SamplingParams:
    """
    Args:
        default: holds where the request says nothing, but for log-probabilities: those it always has to ask for.
        most_tokens: new ones, where the request names no number.

    Raises:
        ApiError: 400, with the name of the request's field.
    """
    said: dict[str, Any] = {
        ours: value for theirs, ours in _NAMES.items() if (value := getattr(request, theirs)) is not None
    }
    if said.get("top_k") == -1:  # as others say: all
        said["top_k"] = 0
    if request.logit_bias is not None:
        said["logit_bias"] = {_token(key): bias for key, bias in request.logit_bias.items()}
    if request.seed is not None:
        said["seed"] = request.seed % 2**64  # clients may send negative ones
    asked = max_tokens_of(request)
    said["max_new_tokens"] = min(default.max_new_tokens, most_tokens) if asked is None else max(1, asked)
    if "min_new_tokens" not in said:
        said["min_new_tokens"] = min(default.min_new_tokens, said["max_new_tokens"])
    values = {**default.model_dump(), **said, "logprobs": logprobs_of(request), "exit_logprobs": False}
    return _validate(SamplingParams, values, _THEIRS, "max_tokens")


def exit_of(request: GenerationRequest, default: ExitParams) -> ExitParams:
    """
    Raises:
        ApiError: 400, with the name of the field, as in early_exit.threshold.
    """
    said = request.early_exit
    if said is None:
        return default
    names = ExitParams.model_fields
    for name in said:
        if name not in names:
            hint = did_you_mean(name, names)
            raise invalid(f"early_exit.{name}", f"unknown field{hint}")
    said = {name: value for name, value in said.items() if value is not None}
    if "threshold" in said:  # it is for all exits, also where the server has others for some of them
        said.setdefault("thresholds", {})
    values = _laid_over(default.model_dump(), said)
    return _validate(ExitParams, values, {}, "early_exit", prefix="early_exit.")


def name_in_request(field: str) -> str:
    """A field of a config, as a request calls it."""
    if field.startswith("inference.sampling."):
        first, *rest = field.split(".")[2:]
        return ".".join([_THEIRS.get(first, first), *rest])
    return field.replace("inference.exit", "early_exit")


def max_tokens_of(request: GenerationRequest) -> int | None:
    """New tokens that a request asks for at most; None: it doesn't say."""
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def logprobs_of(request: GenerationRequest) -> int | None:
    """Of how many likeliest tokens log-probabilities are asked for, beside each token's own; None: of none."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    assert isinstance(request, ChatCompletionRequest)
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise invalid("top_logprobs", "needs logprobs: true")
    return None


def _token(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 20):
        raise invalid("logit_bias", f"{key[:40]!r} is no token id")
    return int(key)


def _laid_over(values: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Sections within sections likewise; but thresholds by layer replace the server's."""
    over = dict(values)
    for name, value in said.items():
        inner = over.get(name)
        nested = name in ("sled", "dola") and isinstance(value, Mapping) and isinstance(inner, Mapping)
        over[name] = {**inner, **value} if nested else value  # type: ignore[dict-item]
    return over


def _validate(
    kind: type[Params], values: Mapping[str, Any], names: Mapping[str, str], fallback: str, *, prefix: str = ""
) -> Params:
    """As JSON, in which all of it came."""
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [str(part) for part in first["loc"] if part != "[key]"]
        name = names.get(place[0], place[0]) if place else fallback
        param = prefix + ".".join([name, *place[1:]]) if place else fallback
        raise invalid(param, _message_of(first)) from None


def _message_of(error: Any) -> str:
    inner = error.get("ctx", {}).get("error")
    problems = getattr(inner, "problems", None)
    return "; ".join(f"{path}: {message}" for path, message in problems) if problems else error["msg"]
