"""Rotary positions (RoFormer, arXiv 2104.09864), for any set of positions: channel i turns with channel i + D/2.

Shapes: S positions, B sequences, N heads, D head dimension.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_ee.config import ModelConfig
from megatron_ee.model.frequencies import attention_factor_of, frequencies_of


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of channels at each position: [S, 1 or B, 1, D/2]. Both are multiplied
    by the model's attention factor."""

    cosine: torch.Tensor
    sine: torch.Tensor


class Rotary:
    """How a model turns queries and keys.

    Args:
        device: where positions will be.
    """

    def __init__(self, model: ModelConfig, device: torch.device | None = None) -> None:
        self._frequencies = frequencies_of(model.head_dim, model.rope_theta, model.rope_scaling).to(device)
        self._attention_factor = attention_factor_of(model.rope_scaling)

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """
        Args:
            positions: [S], or [S, B] where the sequences of a batch are at different positions; integers.
            dtype: of what will be rotated.
        """
        angles = positions.reshape(positions.shape[0], -1, 1, 1).to(torch.float64) * self._frequencies
        cosine, sine = (self._attention_factor * part for part in (angles.cos(), angles.sin()))
        return Rotation(cosine.to(dtype), sine.to(dtype))


def rotate(x_SBND: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Queries or keys, turned by their positions. Nothing of them is kept for the backward: it turns back. (Where there
    is an attention factor it multiplies the gradient too, as it should.)"""
    rotated: torch.Tensor = _Rotate.apply(x_SBND, *rotation)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBND: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x_SBND, cosine, sine, by=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SBND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _turn(gradient_SBND, *ctx.saved_tensors, by=-1), None, None


def _turn(x_SBND: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, by: int) -> torch.Tensor:
    """Each half is written where it belongs: joining them would be a copy."""
    turned_SBND = torch.empty_like(x_SBND)
    first, second = x_SBND.chunk(2, dim=-1)
    turned_first, turned_second = turned_SBND.chunk(2, dim=-1)
    torch.mul(first, cosine, out=turned_first)
    turned_first.addcmul_(second, sine, value=-by)
    torch.mul(second, cosine, out=turned_second)
    turned_second.addcmul_(first, sine, value=by)
    return turned_SBND


class RotationTable:
    """All positions up to a capacity, for decoding: rows of it are picked a launch. It turns the R queries and the key
    of a head, and leaves its value as it is: X = R + 2 vectors.

    Args:
        group: R.
        dtype: of what will be turned.

    Attributes:
        device, dtype: of what it has.
    """

    def __init__(self, rotary: Rotary, capacity: int, group: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.dtype = device, dtype
        cosine_CD, sine_CD = (part.flatten(1) for part in rotary.at(torch.arange(capacity, device=device), dtype))
        self._cosine_C1XD = _with_value(torch.cat((cosine_CD, cosine_CD), -1), group, value=1.0)
        self._sine_C1XD = _with_value(torch.cat((-sine_CD, sine_CD), -1), group, value=0.0)

    def at(self, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a channel, and what the other channel of its pair, is multiplied by: each [N, 1, X, D]."""
        return self._cosine_C1XD.index_select(0, positions_N), self._sine_C1XD.index_select(0, positions_N)

    def of(self, positions: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at neighbouring positions, without a copy."""
        return self._cosine_C1XD[positions], self._sine_C1XD[positions]


def _with_value(part_CD: torch.Tensor, group: int, *, value: float) -> torch.Tensor:
    part_CXD = part_CD[:, None].repeat(1, group + 2, 1)
    part_CXD[:, -1] = value
    return part_CXD[:, None]


def turn(x_NGXD: torch.Tensor, cosine_N1XD: torch.Tensor, sine_N1XD: torch.Tensor) -> torch.Tensor:
    """Heads turned by what a `RotationTable` says of their rows; `rotate`, where there is no backward."""
    return torch.addcmul(x_NGXD * cosine_N1XD, x_NGXD.roll(x_NGXD.shape[-1] // 2, -1), sine_N1XD)
