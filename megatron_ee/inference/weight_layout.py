"""How matrices lie in memory while a CPU decodes.

A launch has few rows, so a product reads its matrix once and does little else. MKL reads a matrix with more outputs
than inputs two to three times as fast where the weights of one input lie together (fp32, one core, one row: 2.2 times
for 1408 x 256, 3.3 times for 8192 x 256); one with fewer outputs is faster as it is, and half precisions don't mind.
"""

import torch

from megatron_ee.model.stage import Stage


def arrange_weights(stage: Stage) -> None:
    """Lay the matrices out anew, one by one and in place: their values, shapes and names stay. Not on a GPU."""
    for parameter in stage.parameters():
        if _gains(parameter):
            parameter.data = parameter.data.t().contiguous().t()


def _gains(parameter: torch.Tensor) -> bool:
    if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.float64) or parameter.dim() != 2:
        return False
    outputs, inputs = parameter.shape
    return outputs >= inputs
