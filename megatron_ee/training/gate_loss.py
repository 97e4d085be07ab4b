"""What a gate learns: whether its exit is right. Shapes: S positions, B sequences.

With logits g and targets r (1: the exit is right, 0: it is not), the loss on a token is

    r * -log sigmoid(g) + c * (1 - r) * -log sigmoid(-g)

c is the cost of a false exit, in missed ones. Where the exit is right with probability r, the loss is least at
sigmoid(g) = r / (r + c (1 - r)): a gate says less than the probability by log c in the logit, and its exit fires later.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import softplus


class GateSums(NamedTuple):
    """Over the unmasked tokens of a micro-batch; whoever has the batch's token count divides."""

    loss: torch.Tensor
    right: torch.Tensor  # tokens on which the gate's verdict, at 0.5, is right
    confidence: torch.Tensor


def gate_loss(
    logits_SB: torch.Tensor,
    right_SB: torch.Tensor,
    mask_SB: torch.Tensor,
    *,
    false_exit_cost: float,
) -> GateSums:
    """
    Args:
        logits_SB: fp32, before the sigmoid.
        right_SB: bool.

    Returns:
        fp32 scalars; the loss has a gradient.
    """
    losses_SB = torch.where(right_SB, softplus(-logits_SB), false_exit_cost * softplus(logits_SB))
    with torch.no_grad():
        verdict = (((logits_SB >= 0) == right_SB) * mask_SB).sum()
        confidence = (logits_SB.sigmoid() * mask_SB).sum()
    return GateSums((losses_SB * mask_SB).sum(), verdict, confidence)
