"""Rotary positions (RoFormer, arXiv 2104.09864), for any set of positions."""

import torch


def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """The angle of each channel at each position, as megatron-core's attention takes them.

    Args:
        positions: [s], or [s, b] where the sequences of a batch are at different positions; integers.

    Returns:
        fp32 [s, 1 or b, 1, head_dim]; the second half repeats the first.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    frequencies = theta ** (-channels / head_dim)
    angles = positions.reshape(positions.shape[0], -1, 1, 1).to(torch.float64) * frequencies
    return torch.cat((angles, angles), dim=-1).to(torch.float32)
