"""How far the distribution is from uniform: 1 - H / ln V, H its entropy (BranchyNet, arXiv 1709.01686)."""

import math

import torch

from megatron_ee.inference.asked_exit import AskedExit


def entropy(asked: AskedExit) -> torch.Tensor:
    """With m the largest logit and p its probability, H is the mean of m - z over the distribution, minus ln p: both
    are positive, so nothing cancels where an exit is sure."""
    logits_NV = asked.logits.to(torch.promote_types(asked.logits.dtype, torch.float32))
    probabilities_NV = logits_NV.softmax(-1)
    below_NV = logits_NV.amax(-1, keepdim=True) - logits_NV
    below_NV.clamp_max_(torch.finfo(below_NV.dtype).max)  # a logit of -inf adds 0, as its probability is 0
    entropy_N = below_NV.mul_(probabilities_NV).sum(-1) - probabilities_NV.amax(-1).log()
    return (1 - entropy_N / math.log(logits_NV.shape[-1])).clamp(0, 1)
