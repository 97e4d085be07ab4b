"""The loss of an exit on one micro-batch."""

from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy


class ExitLoss(NamedTuple):
    """Sums over the unmasked tokens of a micro-batch; whoever has the batch's token count divides."""

    cross_entropy: torch.Tensor
    correct: torch.Tensor


def exit_loss(logits_SBV: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor) -> ExitLoss:
    """Cross-entropy (nats, fp32) and right top-1 predictions, summed over the tokens whose mask is 1."""
    logits_BSV = logits_SBV.transpose(0, 1)
    losses_BS = cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="none")
    correct_BS = (logits_BSV.argmax(-1) == labels_BS).float()
    return ExitLoss((losses_BS * mask_BS.flatten()).sum(), (correct_BS * mask_BS).sum())
