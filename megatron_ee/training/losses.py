"""The loss of an exit on one micro-batch, and what it is divided by."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from megatron_ee.data.batch import Batch
from megatron_ee.parallel.mesh import Mesh


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


def count_tokens(batch: Batch, mesh: Mesh) -> float:
    """Unmasked tokens of the global batch. Every summed loss is divided by it before its backward, so that the gradient
    doesn't depend on how the batch is cut into micro-batches and ranks. Collective over data-parallel ranks."""
    total = batch.mask_MBS.sum(dtype=torch.float64)
    dist.all_reduce(total, group=mesh.groups.dp)
    return float(total)
