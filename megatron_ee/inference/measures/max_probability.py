"""The probability of the likeliest token (CALM, arXiv 2207.07061, calls it the softmax response)."""

import torch

from megatron_ee.inference.asked_exit import AskedExit


def max_probability(asked: AskedExit) -> torch.Tensor:
    logits_NV = asked.logits_NV
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    return (logits_NV.amax(-1) - logits_NV.logsumexp(-1)).exp()
