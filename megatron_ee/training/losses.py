"""The loss of an exit on one micro-batch, and what it is divided by."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ee.data.batch import Batch
from megatron_ee.model.split_vocabulary import likeliest_tokens, token_losses
from megatron_ee.parallel.mesh import Mesh


class ExitLoss(NamedTuple):
    """Sums over the unmasked tokens of a micro-batch; whoever has the batch's token count divides."""

    cross_entropy: torch.Tensor
    correct: torch.Tensor


def exit_loss(
    logits_SBV: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor, group: dist.ProcessGroup
) -> ExitLoss:
    """Cross-entropy (nats, fp32) and right top-1 predictions, summed over the tokens whose mask is 1.

    Args:
        logits_SBV: this rank's share of the vocabulary, which is split over `group`; it may be overwritten.
    """
    labels_SB, mask_SB = labels_BS.T, mask_BS.T
    correct_SB = (likeliest_tokens(logits_SBV, group) == labels_SB).float()
    losses_SB = token_losses(logits_SBV, labels_SB, group)
    return ExitLoss((losses_SB * mask_SB).sum(), (correct_SB * mask_SB).sum())


def count_tokens(batch: Batch, mesh: Mesh) -> float:
    """Unmasked tokens of the global batch. Every summed loss is divided by it before its backward, so that the gradient
    doesn't depend on how the batch is cut into micro-batches and ranks. Collective over data-parallel ranks."""
    total = batch.mask_MBS.sum(dtype=torch.float64)
    dist.all_reduce(total, group=mesh.groups.dp)
    return float(total)
