"""SwiGLU against its plain version."""

import pytest
import torch
from torch.nn.functional import silu

from megatron_ee.model.swiglu import swiglu


def _plain(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_the_plain_version(dtype: torch.dtype) -> None:
    x, incoming = torch.randn(3, 5, 14).to(dtype), torch.randn(3, 5, 7).to(dtype)
    measured = []
    for function in (swiglu, _plain):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        torch.autograd.backward(y, incoming)
        measured.append((y.detach(), leaf.grad))
    assert torch.equal(measured[0][0], measured[1][0])
    torch.testing.assert_close(measured[0][1], measured[1][1])


def test_its_gradient_is_its_derivative() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x)
