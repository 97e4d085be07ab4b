"""How little the layers since the model's exit before have turned the hidden state: max(0, cos) of the two (the
hidden-state saturation of CALM, arXiv 2207.07061). No product with the vocabulary."""

import torch

from megatron_ee.inference.asked_exit import AskedExit


def cosine(asked: AskedExit) -> torch.Tensor:
    """A state of zeros has a cosine of 0."""
    wide = torch.promote_types(asked.output_NH.dtype, torch.float32)
    return torch.cosine_similarity(asked.output_NH.to(wide), asked.previous_NH.to(wide), dim=-1).clamp(0, 1)
