"""Cross-entropy and the likeliest token where tensor-parallel ranks hold a share of the vocabulary each.

Shapes: S positions, B sequences, V this rank's share of the vocabulary; ranks hold consecutive shares.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.nn.functional import cross_entropy


def token_losses(logits_SBV: torch.Tensor, labels_SB: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Cross-entropy of each token over the whole vocabulary: fp32 [S, B], in nats. The logits may be overwritten."""
    if group.size() == 1:
        losses = cross_entropy(logits_SBV.flatten(0, 1).float(), labels_SB.flatten(), reduction="none")
        return losses.view_as(labels_SB)
    return vocab_parallel_cross_entropy(logits_SBV.float(), labels_SB.contiguous())


def likeliest_tokens(logits_SBV: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The argmax over the whole vocabulary: int64 [S, B]; the first of equals."""
    highest_SB, tokens_SB = logits_SBV.detach().max(dim=-1)
    if group.size() == 1:
        return tokens_SB
    best_SB = highest_SB.clone()
    dist.all_reduce(best_SB, op=dist.ReduceOp.MAX, group=group)
    vocab_size = logits_SBV.shape[-1] * group.size()
    tokens_SB = torch.where(highest_SB == best_SB, tokens_SB + group.rank() * logits_SBV.shape[-1], vocab_size)
    dist.all_reduce(tokens_SB, op=dist.ReduceOp.MIN, group=group)
    return tokens_SB
