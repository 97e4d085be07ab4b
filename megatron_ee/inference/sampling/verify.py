"""What full depth says of drafted tokens: how many of them it accepts, and its own token after those.

A greedy request accepts what it would have chosen itself. A sampled one accepts a token x with probability
min(1, p(x) / q(x)), p being full depth's distribution and q the draft's, and after the first that it does not accept
draws from (p - q)+, normalised: its tokens are distributed as if there were no draft (arXiv 2211.17192, theorem 1).
Both distributions are those after all sampling settings, each with the whole text before its token.

Shapes: R rows of all requests, M those of sampled ones, D drafted tokens among these, N requests, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_ee.inference.sampling.adjust import adjusted
from megatron_ee.inference.sampling.choose import Choice
from megatron_ee.inference.sampling.distribution import sampled_probabilities
from megatron_ee.inference.sampling.draw import NO_TOKEN, drawn, likeliest
from megatron_ee.inference.sampling.draws import Draws, Row
from megatron_ee.inference.sampling.logprobs import logprobs_of
from megatron_ee.inference.sampling.rows import pick


@dataclass(frozen=True, slots=True)
class Drafted:
    """What one request has drafted.

    Attributes:
        tokens: maybe none.
        probabilities: p_V of each, which it was drawn from; of a greedy request none.
        num_rows: full depth's answers: before each token, and, unless a stop token is the last, after all of them.
    """

    draws: Draws
    tokens: Sequence[int]
    probabilities: Sequence[torch.Tensor]
    num_rows: int

    @property
    def rows(self) -> Iterator[Row]:
        return (Row(self.draws, tuple(self.tokens[:count])) for count in range(self.num_rows))


def verify(logits_RV: torch.Tensor, drafts: Sequence[Drafted]) -> list[list[Choice]]:
    """Of each request the accepted tokens and one more, unless the draft's end is the text's, or full depth says
    nothing there; maybe none at all. Random numbers of a request: one for each token that is tested, and one for the
    token that is drawn.

    Args:
        logits_RV: of full depth, request after request.
    """
    assert len(logits_RV) == sum(of.num_rows for of in drafts)
    firsts = list(accumulate((of.num_rows for of in drafts), initial=0))
    tokens: dict[int, list[int]] = {}
    for is_greedy, decide in ((True, _greedy), (False, _sampled)):
        numbers = [number for number, of in enumerate(drafts) if of.draws.is_greedy == is_greedy]
        if numbers:
            rows = [row for number in numbers for row in range(firsts[number], firsts[number + 1])]
            of_kind = decide(pick(logits_RV, rows), [drafts[number] for number in numbers])
            tokens.update(zip(numbers, map(_said, of_kind), strict=True))
    return [
        _choices(logits_RV, first, tokens[number], of.draws)
        for number, (first, of) in enumerate(zip(firsts, drafts, strict=False))
    ]


def _greedy(logits_MV: torch.Tensor, drafts: Sequence[Drafted]) -> list[list[int]]:
    rows = [row for of in drafts for row in of.rows]
    changed = [number for number, row in enumerate(rows) if row.draws.changes_logits(row.drafted)]
    likeliest_M = likeliest(logits_MV)
    if changed:
        likeliest_M[changed] = likeliest(adjusted(pick(logits_MV, changed), [rows[number] for number in changed]))
    answers = iter(likeliest_M.tolist())
    found = []
    for of in drafts:
        own = [next(answers) for _ in range(of.num_rows)]
        accepted = _common(own, of.tokens)
        found.append(own[: accepted + 1])
    return found


def _said(tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens[-1] == NO_TOKEN else tokens


def _common(own: Sequence[int], drafted: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    count = 0
    while count < min(len(own), len(drafted)) and own[count] == drafted[count]:
        count += 1
    return count


def _sampled(logits_MV: torch.Tensor, drafts: Sequence[Drafted]) -> list[list[int]]:
    rows = [row for of in drafts for row in of.rows]
    p_MV = sampled_probabilities(adjusted(logits_MV, rows), [row.draws.params for row in rows])
    firsts = list(accumulate((of.num_rows for of in drafts), initial=0))
    accepted = _accepted(p_MV, drafts, firsts)
    going = [number for number, of in enumerate(drafts) if accepted[number] < of.num_rows]
    left_NV = p_MV[[firsts[number] + accepted[number] for number in going]]
    for place, number in enumerate(going):
        if accepted[number] < len(drafts[number].tokens):
            left_NV[place] = _left_over(left_NV[place], drafts[number].probabilities[accepted[number]])
    u_N = torch.tensor([drafts[number].draws.uniform() for number in going], dtype=torch.float64)
    last = dict(zip(going, drawn(left_NV, u_N).tolist() if going else (), strict=True))
    return [
        [*of.tokens[: accepted[number]], *([last[number]] if number in last else [])]
        for number, of in enumerate(drafts)
    ]


def _accepted(p_MV: torch.Tensor, drafts: Sequence[Drafted], firsts: Sequence[int]) -> list[int]:
    """How many of each request's tokens are accepted."""
    places = [
        (firsts[number] + place, token) for number, of in enumerate(drafts) for place, token in enumerate(of.tokens)
    ]
    if not places:
        return [0] * len(drafts)
    rows_D, tokens_D = torch.tensor(places, device=p_MV.device).T
    q_DV = torch.stack([q_V for of in drafts for q_V in of.probabilities])
    p_D = p_MV[rows_D, tokens_D]
    q_D = q_DV.gather(1, tokens_D[:, None])[:, 0]
    ratios = iter(torch.stack((p_D, q_D), dim=1).double().tolist())
    accepted = []
    for of in drafts:
        own = [next(ratios) for _ in of.tokens]
        count = 0
        while count < len(own) and of.draws.uniform() * own[count][1] < own[count][0]:  # false where p is NaN
            count += 1
        accepted.append(count)
    return accepted


def _left_over(p_V: torch.Tensor, q_V: torch.Tensor) -> torch.Tensor:
    """(p - q)+, normalised. Where rounding has left nothing of it, the two are the same."""
    left_V = (p_V - q_V).clamp_(min=0)
    total = left_V.sum()
    return torch.where(total == 0, p_V, left_V / total)  # NaN stays NaN


def _choices(logits_RV: torch.Tensor, first_row: int, tokens: Sequence[int], draws: Draws) -> list[Choice]:
    if draws.params.logprobs is None:
        return [Choice(token) for token in tokens]
    own_RV = logits_RV[first_row : first_row + len(tokens)]
    return [Choice(*of) for of in zip(tokens, logprobs_of(own_RV, tokens, draws.params.logprobs), strict=True)]
