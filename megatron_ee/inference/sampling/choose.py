"""A token for each row of a batch.

Shapes: N rows, M some of them, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_ee.inference.request import Logprobs
from megatron_ee.inference.sampling.adjust import adjusted
from megatron_ee.inference.sampling.distribution import sampled_probabilities
from megatron_ee.inference.sampling.draw import NO_TOKEN, drawn, likeliest
from megatron_ee.inference.sampling.draws import Draws, Row
from megatron_ee.inference.sampling.logprobs import logprobs_of
from megatron_ee.inference.sampling.rows import pick


@dataclass(frozen=True, slots=True)
class Choice:
    token: int
    logprobs: Logprobs | None = None


def choose(logits_NV: torch.Tensor, draws: Sequence[Draws]) -> list[Choice | None]:
    """A token for each row, and its log-probabilities where the request wants them. None: a row's logits are NaN,
    infinite or all ruled out."""
    assert len(logits_NV) == len(draws)
    if all(of.is_plain for of in draws):
        return [_choice(token) for token in likeliest(logits_NV).tolist()]
    tokens = _tokens(logits_NV, draws)
    logprobs = _logprobs(logits_NV, tokens, draws)
    return [_choice(token, logprobs.get(number)) for number, token in enumerate(tokens)]


def _choice(token: int, logprobs: Logprobs | None = None) -> Choice | None:
    return None if token == NO_TOKEN else Choice(token, logprobs)


def _tokens(logits_NV: torch.Tensor, draws: Sequence[Draws]) -> list[int]:
    """Rows of a kind together, with no more work than they need, and one copy to the host for all."""
    kinds: dict[Callable[[torch.Tensor, Sequence[Draws]], torch.Tensor], list[int]] = {}
    for number, of in enumerate(draws):
        kind = _sampled if not of.is_greedy else _greedy if of.changes_logits() else _as_they_are
        kinds.setdefault(kind, []).append(number)
    found = [kind(pick(logits_NV, numbers), [draws[number] for number in numbers]) for kind, numbers in kinds.items()]
    numbers = [number for of_kind in kinds.values() for number in of_kind]
    return [token for _, token in sorted(zip(numbers, torch.cat(found).tolist(), strict=True))]


def _as_they_are(logits_MV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    return likeliest(logits_MV)


def _greedy(logits_MV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    return likeliest(adjusted(logits_MV, [Row(of) for of in draws]))


def _sampled(logits_MV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    p_MV = sampled_probabilities(adjusted(logits_MV, [Row(of) for of in draws]), [of.params for of in draws])
    return drawn(p_MV, torch.tensor([of.uniform() for of in draws], dtype=torch.float64))


def _logprobs(logits_NV: torch.Tensor, tokens: Sequence[int], draws: Sequence[Draws]) -> dict[int, Logprobs]:
    """By the number of the row, of those that want them."""
    found: dict[int, Logprobs] = {}
    for top in {of.params.logprobs for of in draws if of.params.logprobs is not None}:
        numbers = [
            number
            for number, (token, of) in enumerate(zip(tokens, draws, strict=True))
            if of.params.logprobs == top and token != NO_TOKEN
        ]
        of_numbers = logprobs_of(pick(logits_NV, numbers), [tokens[number] for number in numbers], top)
        found.update(zip(numbers, of_numbers, strict=True))
    return found
