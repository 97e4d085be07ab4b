"""Rules out the unlikely tokens of rows that are sampled: their logits become -inf, in place.

A row keeps what reaches a border of its own. That is a value, so it depends neither on how equals are sorted nor on
other rows.

Shapes: M rows, R those of them that have the limit, V vocabulary, K candidates in descending order.
"""

import math
from collections.abc import Sequence

import torch

from megatron_ee.config import SamplingParams
from megatron_ee.inference.sampling.rows import pick
from megatron_ee.inference.sampling.weights import WHOLE, weights_of

_CANDIDATES = 1024  # a nucleus is seldom larger, and to sort a whole vocabulary takes several times as long


def keep_min_p(logits_MV: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Keep what is at least min_p times as likely as the likeliest token (arXiv 2407.01082), whose logit is 0."""
    rows = [row for row, of in enumerate(params) if of.min_p > 0]
    if rows:
        logits_RV = pick(logits_MV, rows)
        border_R1 = logits_MV.new_tensor([[math.log(params[row].min_p)] for row in rows])
        _rule_out(logits_MV, rows, logits_RV < border_R1)


def keep_top_k(logits_MV: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Keep the top_k likeliest tokens, and others that are as likely as the last of them."""
    rows = [row for row, of in enumerate(params) if 0 < of.top_k < logits_MV.shape[-1]]
    if rows:
        logits_RV = pick(logits_MV, rows)
        limits = [params[row].top_k for row in rows]
        last_R1 = torch.tensor(limits, device=logits_MV.device)[:, None] - 1
        border_R1 = logits_RV.topk(max(limits)).values.gather(1, last_R1)
        _rule_out(logits_MV, rows, logits_RV < border_R1)


def keep_top_p(logits_MV: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Keep the likeliest tokens that together have probability top_p (arXiv 1904.09751) among those that are left, and
    others that are as likely as the last of them."""
    rows = [row for row, of in enumerate(params) if of.top_p < 1]
    if rows:
        p_RV = pick(logits_MV, rows).softmax(-1)
        aim_R = torch.tensor([int(params[row].top_p * WHOLE) for row in rows], device=logits_MV.device)
        most = max(params[row].top_k or p_RV.shape[-1] for row in rows)
        _rule_out(logits_MV, rows, p_RV < _nucleus_border(p_RV, aim_R, min(most, p_RV.shape[-1]))[:, None])


def _nucleus_border(p_RV: torch.Tensor, aim_R: torch.Tensor, most: int) -> torch.Tensor:
    """The probability of the last token that is needed to reach the aim [R].

    Args:
        most: no row needs more tokens.
    """
    if p_RV.is_cuda or most <= _CANDIDATES:  # there, asking whether a few were enough takes longer than sorting all
        return _border_among(p_RV, aim_R, most)[0]
    border_R, reached_R = _border_among(p_RV, aim_R, _CANDIDATES)
    flat = (reached_R < aim_R).nonzero()[:, 0]
    if len(flat):
        border_R[flat] = _border_among(p_RV[flat], aim_R[flat], most)[0]
    return border_R


def _border_among(p_RV: torch.Tensor, aim_R: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The border if it is among the so many likeliest tokens, else the last of them; and what they have together."""
    p_RK = p_RV.topk(size).values if size < p_RV.shape[-1] else p_RV.sort(descending=True).values
    weights_RK = weights_of(p_RK)
    reached_RK = weights_RK.cumsum(-1)
    needed_R = (reached_RK - weights_RK < aim_R[:, None]).sum(-1).clamp(min=1)
    return p_RK.gather(1, needed_R[:, None] - 1)[:, 0], reached_RK[:, -1]


def _rule_out(logits_MV: torch.Tensor, rows: Sequence[int], ruled_out_RV: torch.Tensor) -> None:
    if len(rows) == len(logits_MV):
        logits_MV.masked_fill_(ruled_out_RV, -math.inf)
    else:
        logits_MV[list(rows)] = logits_MV[list(rows)].masked_fill(ruled_out_RV, -math.inf)
