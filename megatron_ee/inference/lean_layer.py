"""One transformer layer for decoding: the parameters of megatron-core's, and a dozen calls of torch.

`Stage.run_layers` is its specification. Decoding a token is bound by Python where the model is small, and modules cost
several times as much as what they compute.

Shapes: N rows, H hidden size, G key-value heads of this rank, R query heads of each of these, D head dimension.
"""

from functools import cached_property
from typing import Protocol

import torch
import torch.distributed as dist
from torch.nn.functional import linear, rms_norm, silu

from megatron_ee.inference.launch import Launch
from megatron_ee.inference.products import Product, Products
from megatron_ee.model.layers import Layer


class LeanNorm:
    """RMSNorm, by the weight of a module."""

    def __init__(self, module: torch.nn.Module, eps: float) -> None:
        assert isinstance(module.weight, torch.nn.Parameter)
        self._weight, self._shape, self._eps = module.weight, module.weight.shape, eps
        width = self._shape[0]
        self._by_length = module.weight.device.type == "cpu" and module.weight.dtype in (torch.float32, torch.float64)
        self._scaled = module.weight * width**0.5 if self._by_length else module.weight
        self._least = module.weight.new_tensor((width * eps) ** 0.5)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._by_length:
            return rms_norm(x, self._shape, self._weight, self._eps)
        # The root of the mean square plus eps is hypot(|x|, sqrt(width * eps)) / sqrt(width): half the time of torch's.
        length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._least)
        return torch.mul(x, self._scaled).div_(length)


class RowSplit:
    """A product whose matrix is split over tensor-parallel ranks by its inputs, added to a residual stream."""

    def __init__(self, product: Product, group: dist.ProcessGroup) -> None:
        self._product = product
        self._group = group if group.size() > 1 else None

    def added_to(self, residual_NH: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        if self._group is None:
            return self._product.added_to(residual_NH, x_NI)
        partial_NH = self._product(x_NI)
        dist.all_reduce(partial_NH, group=self._group)
        return residual_NH + partial_NH


class LeanMlp:
    """SwiGLU (arXiv 2002.05202) with the norm before it, added to the residual stream."""

    def __init__(
        self, norm: torch.nn.Module, mlp: torch.nn.Module, eps: float, products: Products, group: dist.ProcessGroup
    ) -> None:
        self._norm = LeanNorm(norm, eps)
        self._gate_and_up = products.of(mlp.linear_fc1.weight)  # type: ignore[union-attr, arg-type]
        self._down = RowSplit(products.of(mlp.linear_fc2.weight), group)  # type: ignore[union-attr, arg-type]

    def __call__(self, x_NH: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_and_up(self._norm(x_NH)).chunk(2, -1)
        return self._down.added_to(x_NH, silu(gate, inplace=True).mul_(up))


class Attending(Protocol):
    """Where rows are, and what their attentions see."""

    def attend(self, attention: int, qkv_NGXD: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Launch.attend`."""
        ...


class LeanLayer:
    """
    Args:
        attention: its number in the cache; see `Stage.attention_windows`.
    """

    def __init__(self, layer: Layer, attention: int, products: Products, group: dist.ProcessGroup) -> None:
        config, inner = layer.config, layer.self_attention
        self._attention = attention
        self._scale = inner.core_attention.softmax_scale or config.kv_channels**-0.5
        eps = config.layernorm_epsilon
        self._norm = LeanNorm(layer.input_layernorm, eps)
        self._weight, self._bias = inner.linear_qkv.weight, inner.linear_qkv.bias
        self._qkv = products.of(self._weight, self._bias)
        groups = inner.num_query_groups_per_partition
        self._heads = groups, inner.num_attention_heads_per_partition // groups + 2, config.kv_channels
        self._projection = RowSplit(products.of(inner.linear_proj.weight), group)
        self._mlp = LeanMlp(layer.pre_mlp_layernorm, layer.mlp, eps, products, group)
        self._head_norms = None
        if inner.q_layernorm is not None:
            self._head_norms = LeanNorm(inner.q_layernorm, eps), LeanNorm(inner.k_layernorm, eps)

    def __call__(self, x_NH: torch.Tensor, launch: Attending) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, and the residual stream after its attention; both [N, H]."""
        qkv_NGXD = self._qkv(self._norm(x_NH)).view(-1, *self._heads)
        if self._head_norms is not None:
            norm_queries, norm_keys = self._head_norms
            queries_NGRD, keys_NG1D, values_NG1D = qkv_NGXD[:, :, :-2], qkv_NGXD[:, :, -2:-1], qkv_NGXD[:, :, -1:]
            qkv_NGXD = torch.cat((norm_queries(queries_NGRD), norm_keys(keys_NG1D), values_NG1D), 2)
        context_NI = launch.attend(self._attention, qkv_NGXD, self._scale)
        after_attention_NH = self._projection.added_to(x_NH, context_NI)
        return self._mlp(after_attention_NH), after_attention_NH

    def store(self, x_NH: torch.Tensor, launch: Launch) -> None:
        """Keys and values alone, of states that do not run through the layer."""
        weight, bias = self._keys_and_values
        groups, _, head_dim = self._heads
        kv_NG2D = linear(self._norm(x_NH), weight, bias).view(-1, groups, 2, head_dim)
        if self._head_norms is not None:
            kv_NG2D = torch.cat((self._head_norms[1](kv_NG2D[:, :, :1]), kv_NG2D[:, :, 1:]), 2)
        launch.store(self._attention, kv_NG2D)

    @cached_property
    def _keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows of the QKV projection that make keys and values: a copy, made where it is needed."""

        def pick(part: torch.Tensor) -> torch.Tensor:
            by_head = part.contiguous().view(*self._heads, *part.shape[1:])
            return by_head[:, -2:].reshape(-1, *part.shape[1:])

        return pick(self._weight), None if self._bias is None else pick(self._bias)
