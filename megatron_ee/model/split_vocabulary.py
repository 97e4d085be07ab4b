"""Cross-entropy, probabilities and the likeliest token where tensor-parallel ranks hold a share of the vocabulary each.

Shapes: S positions, B sequences, V this rank's share of the vocabulary, K ranks; ranks hold consecutive shares.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
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


def log_probabilities(logits_SBV: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """log of the softmax over the whole vocabulary: this rank's share of it, [S, B, V] in the logits' dtype."""
    if group.size() == 1:
        return logits_SBV.log_softmax(-1)
    highest_SB1 = logits_SBV.detach().amax(-1, keepdim=True)
    dist.all_reduce(highest_SB1, op=dist.ReduceOp.MAX, group=group)
    shifted_SBV = logits_SBV - highest_SB1
    total_SB1 = sum_over_vocabulary(shifted_SBV.exp(), group)[..., None]
    # what each rank's share of the result asks of the total is summed over ranks
    log_SBV: torch.Tensor = shifted_SBV - copy_to_tensor_model_parallel_region(total_SB1, group=group).log()
    return log_SBV


def sum_over_vocabulary(values_SBV: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[S, B] from every rank's share."""
    sum_SB = values_SBV.sum(-1)
    if group.size() == 1:
        return sum_SB
    summed: torch.Tensor = reduce_from_tensor_model_parallel_region(sum_SB, group=group)
    return summed


def of_all_ranks(figures: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[K, ...]: what each rank has."""
    if group.size() == 1:
        return figures[None]
    gathered = figures.new_empty(group.size() * len(figures), *figures.shape[1:])
    dist.all_gather_into_tensor(gathered, figures, group=group)
    return gathered.view(group.size(), *figures.shape)
