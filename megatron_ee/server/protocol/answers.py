"""The answers of both interfaces, whole and in pieces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ee.inference.completion import drafts_of
from megatron_ee.inference.request import Emission

Kind = Literal["completion", "chat"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of an answer say of it."""

    kind: Kind
    identity: str
    model: str
    created: int

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head(whole=True), "choices": list(choices), "usage": dict(usage)}

    def piece(self, choice: Mapping[str, Any], *, tells_usage: bool) -> dict[str, Any]:
        """
        Args:
            tells_usage: the last piece of the answer will tell it; then others say that they don't.
        """
        return {**self._head(whole=False), "choices": [choice], **({"usage": None} if tells_usage else {})}

    def last_piece(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head(whole=False), "choices": [], "usage": dict(usage)}

    def choice(
        self, index: int, text: str, logprobs: Mapping[str, Any] | None, finish_reason: str | None, depths: Any
    ) -> dict[str, Any]:
        """One text, as a whole."""
        words = {"text": text} if self.kind == "completion" else {"message": _message(text)}
        return self._choice(index, words, logprobs, finish_reason, depths)

    def news(
        self,
        index: int,
        text: str,
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None,
        depths: Any,
        *,
        is_first: bool,
    ) -> dict[str, Any]:
        """What is new of one text."""
        role = {"role": "assistant"} if is_first else {}
        words = {"text": text} if self.kind == "completion" else {"delta": {**role, "content": text}}
        return self._choice(index, words, logprobs, finish_reason, depths)

    def _choice(
        self,
        index: int,
        words: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None,
        depths: Any,
    ) -> dict[str, Any]:
        return {
            "index": index,
            **words,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "early_exit": depths,
        }

    def _head(self, *, whole: bool) -> dict[str, Any]:
        if self.kind == "completion":
            kind = "text_completion"
        else:
            kind = "chat.completion" if whole else "chat.completion.chunk"
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}


def usage_of(num_prompt: int, emissions: Sequence[Emission]) -> dict[str, Any]:
    """Tokens of prompts and answers; OpenAI's names for drafts are those of its predicted outputs."""
    drafts = drafts_of(emissions)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(emissions),
        "total_tokens": num_prompt + len(emissions),
        "completion_tokens_details": {
            "accepted_prediction_tokens": drafts.accepted,
            "rejected_prediction_tokens": drafts.drafted - drafts.accepted,
        },
    }


def _message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "refusal": None}
