"""A request's side of sampling."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_ee.inference.request import Request
from megatron_ee.inference.sampling.history import Counts, History, Tokens


class Draws:
    """A request's random numbers and what it has said so far.

    Attributes:
        answer: the tokens so far; whoever takes a token appends it, and nobody takes one back.
        is_greedy: its tokens are the likeliest ones.
        num_drawn: random numbers so far.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.params = request, request.sampling
        self.answer: list[int] = []
        self.num_drawn = 0
        params = self.params
        self.is_greedy = params.temperature == 0
        self.has_penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)
        self._wants_logprobs = params.logprobs is not None or params.exit_logprobs
        self._always_changes = self.has_penalties or bool(params.logit_bias)
        self._num_in_history = 0

    @property
    def is_plain(self) -> bool:
        """Whether the argmax of the logits as they are is all that is wanted of them now."""
        return self.is_greedy and not self._wants_logprobs and not self.changes_logits()

    def changes_logits(self, drafted: Sequence[int] = ()) -> bool:
        """Whether bias, penalties or a ban change the logits after so many drafted tokens."""
        return self._always_changes or self.bans_stops(drafted)

    def bans_stops(self, drafted: Sequence[int] = ()) -> bool:
        """Whether it is too early for a stop token."""
        return len(self.answer) + len(drafted) < self.params.min_new_tokens and len(self.stops) > 0

    @cached_property
    def stops(self) -> Tokens:
        return np.array(sorted(self.request.stops), dtype=np.int64)

    @cached_property
    def bias(self) -> tuple[Tokens, npt.NDArray[np.float64]]:
        """Tokens, and what is added to the logit of each."""
        bias = self.params.logit_bias
        return np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float64)

    def counted(self, drafted: Sequence[int] = ()) -> tuple[Tokens, Counts]:
        """The tokens that penalties may touch, each once, and how often the answer has each."""
        self._history.extend(self.answer[self._num_in_history :])
        self._num_in_history = len(self.answer)
        return self._history.counted(drafted)

    def uniform(self) -> float:
        """The next random number of this request, in [0, 1). A token takes one; where it is drafted it takes another,
        and so does the question whether it is accepted."""
        self.num_drawn += 1
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def skip_to(self, num_drawn: int) -> None:
        """So many have been drawn, some of them by others."""
        while self.num_drawn < num_drawn:
            self.uniform()

    @cached_property
    def _generator(self) -> torch.Generator:
        seed = self.request.seed if self.params.seed is None else self.params.seed
        return torch.Generator().manual_seed(seed)

    @cached_property
    def _history(self) -> History:
        return History(() if self.params.repetition_penalty == 1 else self.request.prompt)


class Row(NamedTuple):
    """Where a token is to be chosen: after a request's answer and what is drafted after it."""

    draws: Draws
    drafted: tuple[int, ...] = ()
