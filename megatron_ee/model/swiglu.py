"""SwiGLU (Shazeer, arXiv 2002.05202) between an MLP's two products.

megatron-core's own, without CUDA's fusions, adds an offset of 0 to one half, keeps both factors for the backward, and
joins the halves' gradients by a copy. This one keeps what came in, and each gradient is written where it belongs.

The plain version, and the specification, is `silu(gate) * up`.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """[..., 2 F], a gate and what it is multiplied with, to [..., F]."""
    return _SwiGLU.apply(x)  # type: ignore[no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, dim=-1)
        torch.mul(incoming, silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(incoming * up, gate, grad_input=dgate)
        return dx
