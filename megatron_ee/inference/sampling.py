"""From logits to a token, as a request says. Rows of a batch are drawn together, and none depends on another.

Shapes: N rows, V the tokenizer's vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ee.inference.request import Logprobs, Request


class Draws:
    """A request's side of sampling: its random numbers and what it has said so far.

    Attributes:
        answer: the tokens so far; whoever takes a token appends it.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.params = request, request.sampling
        self.answer: list[int] = []
        seed = request.seed if self.params.seed is None else self.params.seed
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def is_plain(self) -> bool:
        """Whether its token is just the likeliest one: greedy, with nothing that changes logits now."""
        return self.params.temperature == 0

    def uniform(self) -> float:
        """The next random number of this request, in [0, 1): one for each token."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Choice:
    token: int
    logprobs: Logprobs | None = None


def choose(logits_NV: torch.Tensor, draws: Sequence[Draws]) -> list[Choice]:
    """A token for each row, and its log-probabilities where the request wants them."""
    return [_choose_one(logits_V, of) for logits_V, of in zip(logits_NV, draws, strict=True)]


def _choose_one(logits_V: torch.Tensor, draws: Draws) -> Choice:
    if draws.params.temperature == 0:
        return Choice(int(logits_V.argmax()))
    scaled_V = logits_V.double() / draws.params.temperature
    reached_V = scaled_V.softmax(-1).cumsum(-1)
    return Choice(int((reached_V > draws.uniform() * reached_V[-1]).byte().argmax()))


def logprobs_of(logits_NV: torch.Tensor, tokens: Sequence[int], top: int) -> list[Logprobs]:
    """Of each row's token and of the `top` likeliest ones, by the logits as they are."""
    raise NotImplementedError
