"""The likeliest token's probability less the next one's (the softmax response of CALM, arXiv 2207.07061)."""

import torch

from megatron_ee.inference.asked_exit import AskedExit


def margin(asked: AskedExit) -> torch.Tensor:
    logits_NV = asked.logits
    probabilities_NV = logits_NV.softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    two_N2 = probabilities_NV.topk(2).values
    return two_N2[:, 0] - two_N2[:, 1]
