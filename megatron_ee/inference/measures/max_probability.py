"""The probability of the likeliest token."""

import torch

from megatron_ee.inference.asked_exit import AskedExit


def max_probability(asked: AskedExit) -> torch.Tensor:
    logits_NV = asked.logits
    return logits_NV.softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32)).amax(-1)
