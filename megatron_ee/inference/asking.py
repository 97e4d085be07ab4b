"""From what a user asks for to requests: prompts as texts or tokens, settings for all of them or for each. Imports no
torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar, cast

from megatron_ee.config import Config, ExitParams, SamplingParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.request import Request
from megatron_ee.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = TypeVar("Params", SamplingParams, ExitParams)


@dataclass(frozen=True, slots=True)
class Asking:
    """
    Attributes:
        config: says what a call doesn't.
        begin: tokens that come before a prompt that is a text.
        stop_token_ids: the model's own.
    """

    config: Config
    tokenizer: Tokenizer
    begin: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        exit: ExitParams | Sequence[ExitParams] | None,
    ) -> list[Request]:
        """One for each prompt. Those without a seed of their own get the run's, and one more for each prompt before.

        Raises:
            FieldError: a prompt is neither a text nor tokens of the tokenizer's; or there are not as many settings as
                prompts.
        """
        tokens = [self._tokens(prompt, f"prompts.{index}") for index, prompt in enumerate(_listed(prompts))]
        samplings = _for_each(sampling, SamplingParams, self.config.inference.sampling, "sampling", len(tokens))
        exits = _for_each(exit, ExitParams, self.config.inference.exit, "exit", len(tokens))
        return [
            Request(prompt, of_sampling, of_exit, self.stop_token_ids, self.config.seed + index)
            for index, (prompt, of_sampling, of_exit) in enumerate(zip(tokens, samplings, exits, strict=True))
        ]

    def _tokens(self, prompt: Prompt, where: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._encode(prompt, where)
        try:
            tokens = tuple(prompt)
        except TypeError:
            raise FieldError(where, f"{prompt!r} is neither a text nor a list of tokens") from None
        if not tokens:
            raise FieldError(where, "no tokens; an empty text is what starts a document")
        size = self.tokenizer.vocab_size
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < size:
                raise FieldError(where, f"{token!r} is none of the tokenizer's tokens, which are 0 to {size - 1}")
        return tuple(map(int, tokens))

    def _encode(self, text: str, where: str) -> tuple[int, ...]:
        """An empty text starts a document."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise FieldError(where, "half a surrogate pair, which is no text") from None
        return (*self.begin, *self.tokenizer.encode(text)) or (self.tokenizer.eod,)


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of numbers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        listed = list(prompts)
    except TypeError:
        raise FieldError("prompts", f"{prompts!r} is neither a text nor tokens nor a list of these") from None
    return [cast(Prompt, listed)] if listed and isinstance(listed[0], Integral) else cast(list[Prompt], listed)


def _for_each(
    params: Params | Sequence[Params] | None, kind: type[Params], default: Params, name: str, count: int
) -> list[Params]:
    if params is None or isinstance(params, kind):
        return [params or default] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, kind) for one in params):
        raise FieldError(name, f"neither {kind.__name__} nor a list of these")
    listed: list[Params] = list(params)
    if len(listed) != count:
        raise FieldError(name, f"{len(listed)} for {count} prompts")
    return listed
