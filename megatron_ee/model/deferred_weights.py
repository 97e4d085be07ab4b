"""Linear layers whose backward leaves the gradient of their weight for later.

The backward of a matrix is two products: the gradient of its input, which an earlier stage waits for, and that of its
weight, which nobody does. Here the backward runs the first, and leaves behind what the second takes (Qi et al., "Zero
Bubble Pipeline Parallelism", arXiv 2401.10241).

Shapes: S positions, B sequences, I inputs, O outputs of this rank's share of a matrix. With sequence parallelism, what
a column-parallel matrix keeps of its input is this rank's share of S, as with megatron-core.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megatron_ee.model.layers import LayerParts


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """A gradient of a weight that is still to be computed. Where positions are split, a collective of the ranks."""

    linear: "DeferredLinear"
    x_SBI: torch.Tensor
    gradient_SBO: torch.Tensor
    splits_positions: bool

    def add(self) -> None:
        """Add it to the weight's gradient."""
        with torch.no_grad():
            x_SBI = _all_positions(self.x_SBI, self.linear) if self.splits_positions else self.x_SBI
            self.linear.add_gradient(self.gradient_SBO.flatten(0, 1).t() @ x_SBI.flatten(0, 1))


class WeightProducts:
    """What backwards have left behind: the products of one backward, in its order, if they are taken after each."""

    def __init__(self) -> None:
        self._left: list[WeightProduct] = []

    def leave(self, product: WeightProduct) -> None:
        self._left.append(product)

    def take(self) -> list[WeightProduct]:
        """All of them; they are the caller's then."""
        left, self._left = self._left, []
        return left


class DeferredLinear(torch.nn.Module):
    """Mixed into one of megatron-core's linear layers. A frozen weight leaves nothing behind; the gradient of a bias,
    which is a sum, is not deferred."""

    weight: torch.nn.Parameter
    tp_group: torch.distributed.ProcessGroup
    products: WeightProducts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # megatron-core's gradient buffers then hand their hook to this module instead of autograd, which never sees a
        # gradient of this weight.
        self.weight.skip_backward_post_hook = True  # type: ignore[attr-defined]
        self._after_gradient: list[Callable[[], None]] = []

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """megatron-core's name: `hook` moves the weight's `grad` to its `main_grad`, and says that it is ready for the
        sum over data ranks where such sums overlap."""
        self._after_gradient.append(hook)

    def add_gradient(self, gradient_OI: torch.Tensor) -> None:
        """What autograd does with a gradient of a leaf."""
        self.weight.grad = gradient_OI if self.weight.grad is None else self.weight.grad + gradient_OI
        for hook in self._after_gradient:
            hook()

    def _forward_impl(self, **settings: Any) -> torch.Tensor:
        """megatron-core's name for the product itself."""
        if not settings["weight"].requires_grad:
            return super()._forward_impl(**settings)  # type: ignore[misc]
        names = ("allreduce_dgrad", "sequence_parallel")
        y_SBO: torch.Tensor = _InputGradient.apply(  # type: ignore[no-untyped-call]
            settings["input"], settings["weight"], self, *(settings[name] for name in names)
        )
        bias_O = settings["bias"]
        return y_SBO if bias_O is None else y_SBO + bias_O


class DeferredColumnParallelLinear(DeferredLinear, ColumnParallelLinear):
    """Each rank has some of the outputs."""


class DeferredRowParallelLinear(DeferredLinear, RowParallelLinear):
    """Each rank has some of the inputs."""


def deferring(parts: LayerParts) -> LayerParts:
    """The same parts with linear layers that defer; of megatron-core's own only."""
    assert (parts.column_linear, parts.row_linear) == (ColumnParallelLinear, RowParallelLinear)
    return replace(parts, column_linear=DeferredColumnParallelLinear, row_linear=DeferredRowParallelLinear)


def collect_products(module: torch.nn.Module) -> WeightProducts:
    """Where all linear layers of `module` that defer leave their products from now on."""
    products = WeightProducts()
    for linear in module.modules():
        if isinstance(linear, DeferredLinear):
            linear.products = products
    return products


class _InputGradient(torch.autograd.Function):
    """x times weight; the backward leaves the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SBI: torch.Tensor,
        weight_OI: torch.Tensor,
        linear: DeferredLinear,
        sums_over_ranks: bool,
        splits_positions: bool,
    ) -> torch.Tensor:
        # Saved by autograd, so that a layer that is computed again has them from its second forward.
        ctx.save_for_backward(x_SBI, weight_OI)
        ctx.linear, ctx.sums_over_ranks, ctx.splits_positions = linear, sums_over_ranks, splits_positions
        all_SBI = _all_positions(x_SBI, linear) if splits_positions else x_SBI
        return torch.matmul(all_SBI, weight_OI.t())

    @staticmethod
    def backward(ctx: Any, gradient_SBO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_SBI, weight_OI = ctx.saved_tensors
        linear = ctx.linear
        linear.products.leave(WeightProduct(linear, x_SBI.detach(), gradient_SBO, ctx.splits_positions))
        gradient_SBI = None
        if ctx.needs_input_grad[0]:
            gradient_SBI = gradient_SBO.matmul(weight_OI)
            if ctx.sums_over_ranks:
                gradient_SBI = reduce_from_tensor_model_parallel_region(gradient_SBI, group=linear.tp_group)
            elif ctx.splits_positions:
                gradient_SBI = reduce_scatter_to_sequence_parallel_region(gradient_SBI, group=linear.tp_group)
        return gradient_SBI, None, None, None, None


def _all_positions(x_SBI: torch.Tensor, linear: DeferredLinear) -> torch.Tensor:
    return gather_from_sequence_parallel_region(x_SBI, group=linear.tp_group)
