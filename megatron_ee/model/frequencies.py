"""How fast each pair of channels turns: rotary frequencies, as they are or scaled for longer sequences.

All are computed in fp64. Shapes: D head dimension.
"""

import math

import torch

from megatron_ee.config.positions import Llama3Scaling, RopeScaling, YarnScaling


def frequencies_of(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """fp64 [D/2]: radians a position, `theta ** (-2 i / D)` where nothing is scaled (arXiv 2104.09864)."""
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None:
        return plain
    match scaling.kind:
        case "linear":
            return plain / scaling.factor
        case "llama3":
            return _mix(plain, scaling.factor, _share_kept_by_turns(plain, scaling))
        case "yarn":
            return _mix(plain, scaling.factor, _share_kept_by_channel(head_dim, theta, scaling))


def attention_factor_of(scaling: RopeScaling | None) -> float:
    """What turned queries and keys are multiplied by: YaRN's (arXiv 2309.00071, equation 22), else 1."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def _mix(plain: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    """Of each frequency a share is kept as it is, and the rest is divided by the factor."""
    return kept * plain + (1 - kept) * plain / factor


def _share_kept_by_turns(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """0 to 1, by how often a pair of channels turns over the positions that the model was first trained for."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _share_kept_by_channel(head_dim: int, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """1 to 0, along a ramp over pairs of channels that lies between `beta_fast` and `beta_slow` turns."""
    first, last = (
        _channel_that_turns(turns, head_dim, theta, scaling.original_max_position_embeddings)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as Hugging Face's: a step instead of a ramp
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)


def _channel_that_turns(turns: float, head_dim: int, theta: float, length: int) -> float:
    """The pair of channels, a real number, that turns so often over `length` positions."""
    return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
