"""The distribution that a request's next token is drawn from.

Shapes: N rows, M some of them, V vocabulary.
"""

from collections.abc import Sequence

import torch

from megatron_ee.config import SamplingParams
from megatron_ee.inference.sampling.adjust import adjusted
from megatron_ee.inference.sampling.draws import Row
from megatron_ee.inference.sampling.rows import pick
from megatron_ee.inference.sampling.truncate import keep_min_p, keep_top_k, keep_top_p

_COLDEST = 1e-30  # temperatures below it are 0 in fp32, or nearly so; all leave the likeliest token alone


def probabilities(logits_NV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Of each row's next token, in fp64 where the logits are, else in fp32; all of it on one token in a greedy row.

    A row that allows no choice (NaN, infinite, all ruled out) is NaN.
    """
    p_NV = adjusted(logits_NV, rows)
    for is_greedy, of in ((True, _certainty), (False, sampled_probabilities)):
        numbers = [number for number, row in enumerate(rows) if row.draws.is_greedy == is_greedy]
        if numbers:
            p_NV[numbers] = of(pick(p_NV, numbers), [rows[number].draws.params for number in numbers])
    return p_NV


def sampled_probabilities(logits_MV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """What temperature, min-p, top-k and top-p leave, in this order.

    Args:
        logits_MV: fp32 or fp64, with all penalties taken; it is changed.
    """
    temperature_M = logits_MV.new_tensor([max(of.temperature, _COLDEST) for of in params])
    # the likeliest comes to 0, which no temperature makes infinite
    logits_MV.sub_(logits_MV.amax(-1, keepdim=True)).div_(temperature_M[:, None])
    keep_min_p(logits_MV, params)
    keep_top_k(logits_MV, params)
    keep_top_p(logits_MV, params)
    return logits_MV.softmax(-1)


def _certainty(logits_MV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    peak_M1, tokens_M1 = logits_MV.max(-1, keepdim=True)
    p_MV = torch.zeros_like(logits_MV).scatter_(-1, tokens_M1, 1.0)
    return p_MV + (peak_M1 - peak_M1)  # 0, or NaN where the peak is no number
