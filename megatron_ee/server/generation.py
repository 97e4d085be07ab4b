"""From a client's request to its answer: tokens, settings, bounds; then the texts as they come. No torch."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from megatron_ee.config import SamplingParams
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.completion import Piece
from megatron_ee.inference.request import Request
from megatron_ee.server.choices import Choice, Echo
from megatron_ee.server.guard.bounds import OutOfBoundsError, check_bounds
from megatron_ee.server.offered import Offered
from megatron_ee.server.protocol.answers import Answer, usage_of
from megatron_ee.server.protocol.errors import ApiError, invalid
from megatron_ee.server.protocol.logprobs import ChatLogprobs, CompletionLogprobs
from megatron_ee.server.protocol.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from megatron_ee.server.protocol.settings import exit_of, max_tokens_of, name_in_request, sampling_of
from megatron_ee.server.streams import DONE, event
from megatron_ee.server.tickets import Asking


@dataclass(frozen=True, slots=True)
class Generation:
    """What a client asks for, understood and within the bounds.

    Attributes:
        requests: of all texts.
        choices: likewise.
        num_prompt: tokens of the prompts, each counted once.
    """

    answer: Answer
    requests: Sequence[Request]
    choices: Sequence[Choice]
    num_prompt: int
    wants_usage: bool

    async def whole(self, asking: Asking) -> dict[str, Any]:
        """The answer.

        Raises:
            ApiError: it failed.
        """
        async for index, said in asking.answers():
            self.choices[index].hear(said)
        bodies = [
            self.answer.choice(choice.index, choice.text, choice.logprobs(), choice.finish_reason, choice.depths())
            for choice in self.choices
        ]
        return self.answer.whole(bodies, self._usage())

    async def pieces(self, asking: Asking) -> AsyncIterator[str]:
        """The answer as events. Where it fails, the last one says why."""
        begun: set[int] = set()
        try:
            async for index, said in asking.answers():
                choice = self.choices[index]
                choice.hear(said)
                if isinstance(said, Piece) and (news := choice.news()) is not None:
                    body = self.answer.news(
                        index, news[0], news[1], choice.finish_reason, news[2], is_first=index not in begun
                    )
                    begun.add(index)
                    yield event(self.answer.piece(body, tells_usage=self.wants_usage))
        except ApiError as error:
            yield event(error.body)
            return
        if self.wants_usage:
            yield event(self.answer.last_piece(self._usage()))
        yield DONE

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.num_prompt, [emission for choice in self.choices for emission in choice.emissions])


async def completion_of(request: CompletionRequest, offered: Offered, identity: str) -> Generation:
    """
    Raises:
        ApiError: 400: something in it is wrong, or out of bounds.
    """
    sampling = _sampling(request, offered)
    prompts = _listed(request.prompt)
    if (count := len(prompts) * (request.n or 1)) > (most := offered.bounds.choices):  # before all are looked at
        raise invalid("n", f"{count} answers, but a request may ask for {most}", code="out_of_bounds")
    tokens = await asyncio.to_thread(lambda: [offered.tokens_of(prompt) for prompt in prompts])
    scores = request.logprobs if request.echo else None
    echoes = [
        Echo(_text_of(prompt, offered), ids, scores is not None) if request.echo else None
        for prompt, ids in zip(prompts, tokens, strict=True)
    ]
    if max_tokens_of(request) == 0 and not request.echo:
        raise invalid("max_tokens", "0 needs echo: there would be nothing to answer")
    style = None if request.logprobs is None else CompletionLogprobs(offered.tokenizer)
    answer = Answer("completion", identity, offered.name, int(time.time()))
    return _generation(answer, request, offered, tokens, sampling, style, echoes, prompt_logprobs=scores)


async def chat_of(request: ChatCompletionRequest, offered: Offered, identity: str) -> Generation:
    """
    Raises:
        ApiError: 400: something in it is wrong, or out of bounds.
    """
    sampling = _sampling(request, offered)
    if max_tokens_of(request) == 0:
        raise invalid("max_tokens", "must be 1 at least")
    tokens = [await asyncio.to_thread(offered.conversation, request.messages)]
    style = ChatLogprobs(offered.tokenizer) if request.logprobs else None
    answer = Answer("chat", identity, offered.name, int(time.time()))
    return _generation(answer, request, offered, tokens, sampling, style, [None])


def new_identity(kind: str) -> str:
    """Of a request; nobody can guess another's."""
    return f"{kind}-{secrets.token_hex(12)}"


def _sampling(request: GenerationRequest, offered: Offered) -> SamplingParams:
    """Before the prompt is looked at, which may take long."""
    offered.check_name(request.model)
    return sampling_of(request, offered.sampling, most_tokens=offered.bounds.new_tokens)


def _generation(
    answer: Answer,
    request: GenerationRequest,
    offered: Offered,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    style: ChatLogprobs | CompletionLogprobs | None,
    echoes: Sequence[Echo | None],
    *,
    prompt_logprobs: int | None = None,
) -> Generation:
    exit = exit_of(request, offered.exit)
    count = request.n or 1
    longest, num_choices = max(map(len, prompts)), len(prompts) * count
    try:
        check_bounds(offered.bounds, sampling=sampling, exit=exit, num_prompt=longest, choices=num_choices)
    except OutOfBoundsError as error:
        raise invalid(name_in_request(error.field), error.message, code="out_of_bounds") from None
    requests: list[Request] = []
    choices: list[Choice] = []
    for tokens, echo in zip(prompts, echoes, strict=True):
        for number in range(count):
            own = sampling if sampling.seed is None else _with_seed(sampling, sampling.seed + number)
            requests.append(offered.request(tokens, own, exit, prompt_logprobs=prompt_logprobs))
            hides = max_tokens_of(request) == 0
            choices.append(Choice(len(choices), offered.tokenizer, style, echo, hides))
    return Generation(answer, requests, choices, sum(map(len, prompts)), request.wants_usage)


def _with_seed(sampling: SamplingParams, seed: int) -> SamplingParams:
    return sampling.model_copy(update={"seed": seed % 2**64})


def _listed(prompt: str | list[Any]) -> list[Prompt]:
    """A list of tokens is one prompt."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [cast(Prompt, prompt)]
    return cast(list[Prompt], prompt)


def _text_of(prompt: Prompt, offered: Offered) -> str:
    return prompt if isinstance(prompt, str) else offered.tokenizer.decode(list(prompt))
