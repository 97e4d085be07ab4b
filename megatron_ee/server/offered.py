"""What a server has to offer: a model, its words, and what may be asked of it. No torch."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ee.config import BoundsConfig, Config, ExitParams, SamplingParams
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.asking import Asking, Prompt
from megatron_ee.inference.request import Request
from megatron_ee.server.protocol.errors import ApiError, invalid
from megatron_ee.server.protocol.settings import name_in_request
from megatron_ee.tokenizer import Tokenizer
from megatron_ee.tokenizer.chat import ChatTemplate
from megatron_ee.tokenizer.messages import parse_messages


@dataclass(frozen=True, slots=True)
class Offered:
    """
    Attributes:
        name: what clients call the model.
        asking: makes tokens of prompts.
        template: of conversations; None: there is none.
        positions: most tokens of a prompt and its answer.
        check: whether the model can serve a request at all; raises FieldError.
        measures: what confidence may be.
    """

    name: str
    config: Config
    num_layers: int
    exits: tuple[int, ...]
    asking: Asking
    template: ChatTemplate | None
    positions: int
    check: Callable[[Request], object]
    measures: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def bounds(self) -> BoundsConfig:
        return self.config.serving.bounds

    @property
    def tokenizer(self) -> Tokenizer:
        return self.asking.tokenizer

    @property
    def sampling(self) -> SamplingParams:
        return self.config.inference.sampling

    @property
    def exit(self) -> ExitParams:
        return self.config.inference.exit

    def check_name(self, name: str) -> None:
        """
        Raises:
            ApiError: 404: it is another's.
        """
        if name != self.name:
            message = f"there is no model {name[:100]!r}: this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """
        Raises:
            ApiError: 400: it is no text, or there is no such token.
        """
        try:
            (request,) = self.asking.requests([prompt], None, None)
        except FieldError as error:
            raise invalid("prompt", error.message) from None
        return request.prompt

    def conversation(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """The tokens after which the model answers.

        Raises:
            ApiError: 400: it is no conversation, or the template refuses it, or there is none.
        """
        if self.template is None:
            raise invalid("messages", f"{self.name} has no chat template; /v1/completions continues texts")
        try:
            return tuple(self.template.prompt(parse_messages([_plain(message) for message in messages])))
        except UserError as error:
            raise invalid(None, str(error)) from None

    def request(
        self, prompt: tuple[int, ...], sampling: SamplingParams, exit: ExitParams, *, prompt_logprobs: int | None = None
    ) -> Request:
        """One that the model can serve. Without a seed of its own it gets one that nobody knows.

        Raises:
            ApiError: 400, with the field.
        """
        request = Request(
            prompt,
            sampling,
            exit,
            self.asking.stop_token_ids,
            seed=secrets.randbits(63),
            prompt_logprobs=prompt_logprobs,
        )
        try:
            self.check(request)
        except FieldError as error:
            raise invalid(name_in_request(error.field), error.message) from None
        return request

    def described(self) -> dict[str, Any]:
        """As an entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "megatron-ee",
            "early_exit": {
                "num_layers": self.num_layers,
                "exits": list(self.exits),
                "measures": list(self.measures),
                "max_model_len": self.positions,
                "has_chat_template": self.template is not None,
                "defaults": self.exit.model_dump(mode="json"),
                "sampling": self.sampling.model_dump(mode="json"),
                "bounds": self.bounds.model_dump(mode="json"),
            },
        }


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Content in parts, which all are texts, as one."""
    content = message.get("content")
    if not isinstance(content, list) or not content:
        return message
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        return message  # which is refused as it is
    return {**message, "content": "".join(str(text) for text in texts)}
