"""Self Logits Evolution Decoding (arXiv 2411.02433): final logits move towards what the exits' logits grew into.

With z_n the logits of exit n, z those of the final output, p = softmax(z_n), v = z_n - z, and I the top_k likeliest
tokens of z, v is held beside the gradient p - e_i that would have led from exit n to token i:

    m_ni = max(cos(v, p - e_i), 0)^2 for i in I,    P_i = sum_n m_ni / sum_nj m_nj
    z -= alpha (1 - t / T) (softmax(z) - P) for t = 0 .. T-1,    then z_i = lower_bound for i not in I

No vector p - e_i is ever written down: v.(p - e_i) = v.p - v_i and |p - e_i|^2 = |p|^2 - 2 p_i + 1.

Shapes: N rows, V vocabulary, T tokens that are in the race, of all rows.
"""

import math
from collections.abc import Sequence

import torch

from megatron_ee.config import SledParams


def sled(final_NV: torch.Tensor, early: Sequence[torch.Tensor], params: SledParams) -> torch.Tensor:
    """The evolved logits [N, V], in fp64 where the final ones are, else in fp32.

    Tokens that are equal at the border of top_k stay in the race together. An exit says nothing (m = 0) of a row where
    it agrees with the final logits, or where either has a number that is not finite; where no exit says anything, z
    stays, but for the lower bound. A row whose largest logit is not finite is given back as it is.

    Args:
        early: of each exit, [N, V].
    """
    final_NV = final_NV.to(torch.promote_types(final_NV.dtype, torch.float32))
    border_N1 = final_NV.topk(min(params.top_k, final_NV.shape[-1])).values[:, -1:]
    races_NV = final_NV >= border_N1
    rows_T, tokens_T = races_NV.nonzero(as_tuple=True)
    m_T = final_NV.new_zeros(len(rows_T))
    for exit_NV in early:
        m_T += _evidence(exit_NV.to(final_NV.dtype), final_NV, rows_T, tokens_T)
    latent_NV = torch.zeros_like(final_NV).index_put_((rows_T, tokens_T), m_T)
    total_N1 = latent_NV.sum(-1, keepdim=True)
    latent_NV /= total_N1
    evolved_NV = final_NV
    for step in range(params.steps):
        rate = params.alpha * (1 - step / params.steps)
        evolved_NV = evolved_NV - rate * (evolved_NV.softmax(-1) - latent_NV)
    evolved_NV = torch.where(total_N1 > 0, evolved_NV, final_NV)
    evolved_NV = torch.where(races_NV, evolved_NV, params.lower_bound)
    return torch.where(final_NV.amax(-1, keepdim=True).isfinite(), evolved_NV, final_NV)


def _evidence(
    early_NV: torch.Tensor, final_NV: torch.Tensor, rows_T: torch.Tensor, tokens_T: torch.Tensor
) -> torch.Tensor:
    """m [T] of one exit, of these tokens of these rows.

    Where the exit is sure of its likeliest token a, p - e_a is a small difference of large numbers. With r the softmax
    of all logits but that one, p - e_a = (1 - p_a) (r - e_a), whose cosine needs no such difference; and p of the
    other tokens is (1 - p_a) r.
    """
    peak_N1, a_N1 = early_NV.max(-1, keepdim=True)
    others_NV = early_NV.scatter(-1, a_N1, -math.inf)
    r_NV = others_NV.softmax(-1)
    p_a_N = (peak_N1[:, 0] - others_NV.logsumexp(-1)).sigmoid()
    rest_N = 1 - p_a_N

    v_NV = early_NV - final_NV
    length_N = torch.linalg.vector_norm(v_NV, dim=-1)
    v_NV -= v_NV.gather(-1, a_N1)  # v.(p - e_i) stays as it is, as p - e_i sums up to 0; v_a is 0 now
    r_T, v_T, is_a_T = r_NV[rows_T, tokens_T], v_NV[rows_T, tokens_T], a_N1[rows_T, 0] == tokens_T
    mean_N, square_N = v_NV.mul_(r_NV).sum(-1), r_NV.square_().sum(-1)

    product_T = torch.where(is_a_T, mean_N[rows_T], (rest_N * mean_N)[rows_T] - v_T)
    distance_T = (1 + p_a_N**2 + rest_N**2 * square_N)[rows_T] - 2 * rest_N[rows_T] * r_T
    distance_T = torch.where(is_a_T, (1 + square_N)[rows_T], distance_T).sqrt_()
    cosine_T = (product_T / (length_N[rows_T] * distance_T)).nan_to_num_(0.0, 0.0, 0.0)
    return cosine_T.clamp_(min=0).square_()
