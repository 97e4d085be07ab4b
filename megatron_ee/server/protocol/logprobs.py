"""Log-probabilities in the two forms that OpenAI's interface has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ee.inference.request import Logprobs
from megatron_ee.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Told:
    """One token.

    Attributes:
        logprobs: None: it is a prompt's first, which nothing comes before.
        offset: characters of the text before it.
    """

    token: int
    text: str
    logprobs: Logprobs | None
    offset: int


class LogprobsStyle(Protocol):
    def body(self, told: Sequence[Told]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """Lists side by side, of `/v1/completions`."""

    tokenizer: Tokenizer

    def body(self, told: Sequence[Told]) -> dict[str, Any]:
        return {
            "tokens": [of.text for of in told],
            "token_logprobs": [None if of.logprobs is None else _number(of.logprobs.token) for of in told],
            "top_logprobs": [None if of.logprobs is None else self._top(of) for of in told],
            "text_offset": [of.offset for of in told],
        }

    def _top(self, told: Told) -> dict[str, float]:
        """The likeliest, and the token itself; of tokens that are written alike, the likelier one."""
        assert told.logprobs is not None
        top: dict[str, float] = {}
        for token, logprob in told.logprobs.top.items():
            top.setdefault(token_text(token, self.tokenizer), _number(logprob))
        top.setdefault(told.text, _number(told.logprobs.token))
        return top


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """An object for each token, of `/v1/chat/completions`."""

    tokenizer: Tokenizer

    def body(self, told: Sequence[Told]) -> dict[str, Any]:
        content = []
        for of in told:
            assert of.logprobs is not None
            top = [self._entry(token, logprob) for token, logprob in of.logprobs.top.items()]
            content.append({**self._entry(of.token, of.logprobs.token), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(token, self.tokenizer)
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """By itself."""
    return tokenizer.decode([token])


def _number(logprob: float) -> float:
    """JSON has no infinity: what cannot be is written as OpenAI writes it."""
    return max(logprob, -9999.0)
