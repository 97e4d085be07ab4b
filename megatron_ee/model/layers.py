"""megatron-core's layers, put together by ModuleSpecs; Transformer Engine's where the device has them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.functional import rms_norm, silu

from megatron_ee.config import ModelConfig
from megatron_ee.device import Device
from megatron_ee.model.attention import AttentionContext, CoreAttention
from megatron_ee.model.swiglu import swiglu

HEAD_NORMS = ("q_layernorm.weight", "k_layernorm.weight")
"""What the names of the weights end with that all heads of an attention share."""


class RMSNorm(torch.nn.Module):
    """arXiv 1910.07467. Not torch's own module: megatron-core's wrapper of that refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(TransformerLayer):
    """megatron-core's layer, which also shows the state between its attention and its MLP."""

    def forward(self, x_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, and the residual stream after its attention; both [S, B, H]."""
        after_attention_SBH, _ = self._forward_attention(x_SBH)
        return self._forward_mlp(after_attention_SBH), after_attention_SBH


class Recompute(NamedTuple):
    """What the backward of a layer computes again: all of it, or some of its modules (core_attn, mlp, layernorm)."""

    layers: bool = False
    modules: tuple[str, ...] = ()

    @property
    def by_megatron(self) -> tuple[str, ...]:
        """The modules that megatron-core sees to. It would compute the core of attention as part of whatever launch was
        last, so that is left to `CoreAttention`."""
        return tuple(module for module in self.modules if module != "core_attn")


NOTHING_RECOMPUTED = Recompute()


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The modules that the transformer layers and exit heads of a stage are made of, and what they share."""

    norm: type
    column_linear: type
    row_linear: type
    context: AttentionContext


def layer_parts(device: Device, model: ModelConfig) -> LayerParts:
    """Transformer Engine's parts on a device that has them, megatron-core's own elsewhere."""
    context = AttentionContext(model.window_of)
    if not device.has_transformer_engine:
        return LayerParts(RMSNorm, ColumnParallelLinear, RowParallelLinear, context)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

    return LayerParts(TENorm, TEColumnParallelLinear, TERowParallelLinear, context)


def layer_spec(parts: LayerParts, config: TransformerConfig) -> ModuleSpec:
    """A pre-norm layer: attention, then SwiGLU, each added to the residual stream."""
    head_norm = parts.norm if config.qk_layernorm else None
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column_linear,
                    core_attention=ModuleSpec(module=CoreAttention, params={"context": parts.context}),
                    linear_proj=parts.row_linear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=mlp_spec(parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def mlp_spec(parts: LayerParts) -> ModuleSpec:
    """SwiGLU."""
    submodules = MLPSubmodules(linear_fc1=parts.column_linear, activation_func=swiglu, linear_fc2=parts.row_linear)
    return ModuleSpec(module=MLP, submodules=submodules)


_FUSED = (  # each needs CUDA, Transformer Engine or Apex
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
)


def transformer_config(
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    *,
    tensor_size: int = 1,
    sequence_parallel: bool = False,
    recomputed_modules: tuple[str, ...] = (),
) -> TransformerConfig:
    """megatron-core's description of one layer.

    It is told nothing of pipeline stages: layers are numbered globally by whoever builds them. Parameters are left as
    they are, for `initialize` to fill by name.

    Args:
        recomputed_modules: parts of a layer that its backward computes again: core_attn, mlp, layernorm.
    """
    unfused: dict[str, Any] = dict.fromkeys(_FUSED, False)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=silu,
        use_te_activation_func=True,  # that is: the one of the spec, whoever made it
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tensor_model_parallel_size=tensor_size,
        sequence_parallel=sequence_parallel,
        recompute_granularity="selective" if recomputed_modules else None,
        recompute_modules=list(recomputed_modules) or None,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        calculate_per_token_loss=True,  # gradients are summed over data-parallel ranks: losses are normalised already
        **unfused,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight
