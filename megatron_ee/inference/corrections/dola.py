"""Decoding by Contrasting Layers (arXiv 2309.03883): what the last layers add to the exit that differs most.

Of each row, that is the exit M whose distribution has the largest Jensen-Shannon divergence to the final one, N. The
logits become log p_N - log p_M; tokens that are less likely than relative_top times the likeliest are ruled out.

Shapes: N rows, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch

from megatron_ee.config import DolaParams


def dola(final_NV: torch.Tensor, early: Sequence[torch.Tensor], params: DolaParams) -> torch.Tensor:
    """The contrasted logits [N, V], in fp64 where the final ones are, else in fp32.

    Each row has an exit of its own; of exits that differ alike it is the first. An exit is not chosen for a row where
    it, or the final output, has a number that is not finite; where that leaves none, the row is log p_N, with what is
    ruled out. A row whose largest logit is not finite becomes NaN.

    Args:
        early: of each exit, [N, V], the shallowest first.
    """
    final_NV = final_NV.to(torch.promote_types(final_NV.dtype, torch.float32))
    log_p_NV = final_NV.log_softmax(-1)
    reference_NV = torch.zeros_like(log_p_NV)
    furthest_N1 = log_p_NV.new_full((len(log_p_NV), 1), -math.inf)
    for exit_NV in early:
        log_q_NV = exit_NV.to(final_NV.dtype).log_softmax(-1)
        divergence_N1 = _jensen_shannon(log_p_NV, log_q_NV)
        is_further_N1 = divergence_N1 > furthest_N1
        furthest_N1 = torch.where(is_further_N1, divergence_N1, furthest_N1)
        reference_NV = torch.where(is_further_N1, log_q_NV, reference_NV)
    contrast_NV = log_p_NV - reference_NV
    if params.relative_top > 0:
        border_N1 = log_p_NV.amax(-1, keepdim=True) + math.log(params.relative_top)
        contrast_NV = torch.where(log_p_NV < border_N1, params.lower_bound, contrast_NV)
    return contrast_NV


def _jensen_shannon(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, [N, 1]; NaN where a logarithm is not finite."""
    log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
    terms_NV = log_p_NV.exp() * (log_p_NV - log_m_NV) + log_q_NV.exp() * (log_q_NV - log_m_NV)
    return terms_NV.sum(-1, keepdim=True) / 2
