"""What the exit's learned gate says: a small head on the hidden state, without a product with the vocabulary."""

import torch

from megatron_ee.inference.asked_exit import AskedExit


def gate(asked: AskedExit) -> torch.Tensor:
    return asked.gate_logits.sigmoid()
