"""Rotary positions against complex numbers: channel i and channel i + D/2 are the parts of one, turned by its angle."""

import pytest
import torch

from megatron_ee.config import ModelConfig
from megatron_ee.model.rotary import Rotary, Rotation, rotate

THETA = 10000.0


def _rotation(positions: torch.Tensor, head_dim: int) -> Rotation:
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, head_dim=head_dim, rope_theta=THETA)
    return Rotary(model).at(positions, torch.float64)


def _plain(x_SBND: torch.Tensor, positions_SB: torch.Tensor) -> torch.Tensor:
    half = x_SBND.shape[-1] // 2
    frequencies = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions_SB[..., None, None] * frequencies
    turned = torch.complex(x_SBND[..., :half], x_SBND[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("shape", [(7,), (7, 3)], ids=["one for all sequences", "one for each"])
def test_a_pair_of_channels_turns_by_its_angle(shape: tuple[int, ...]) -> None:
    x_SBND = torch.randn(7, 3, 2, 10, dtype=torch.float64)
    positions = torch.randint(1000, shape)
    rotated = rotate(x_SBND, _rotation(positions, 10))
    expected = _plain(x_SBND, positions.reshape(7, -1).expand(7, 3))
    torch.testing.assert_close(rotated, expected)


def test_its_gradient_is_its_derivative() -> None:
    rotation = _rotation(torch.arange(3, 7), 6)
    x_SBND = torch.randn(4, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), x_SBND)


def test_of_slices_as_megatron_core_hands_them_over() -> None:
    whole = torch.randn(5, 2, 3, 24, dtype=torch.float64)
    rotation = _rotation(torch.arange(5), 8)
    torch.testing.assert_close(rotate(whole[..., 8:16], rotation), rotate(whole[..., 8:16].contiguous(), rotation))
