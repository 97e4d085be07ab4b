"""An exit: what turns a hidden state into logits. Its features are a norm of the state, of the state after an MLP, or
of the state after a whole transformer layer; a projection on the vocabulary follows.

The MLP head (EE-LLM, arXiv 2312.04916, section 3.2) reads the state after its layer's attention and adds an MLP branch
of its own, as the layer does: h + MLP(norm(h)). Its parameters are named as the layer's, and so is the block's: an exit
that begins as a copy of a layer is a copy name by name.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ee.config import GateKind, HeadKind
from megatron_ee.model.gate import Gate
from megatron_ee.model.layers import LayerParts, layer_spec, mlp_spec


class ExitHead(MegatronModule):
    """The final output is an exit like the others.

    Args:
        layer: the number of layers run before the exit.
        owns_projection: whether it has a projection of its own, `output`.
        owns_norm: False where its features are not normed yet: the stage has the norm then.
        temperature: what its logits are divided by.
        gate: what kind of gate it has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parts: LayerParts,
        groups: ProcessGroupCollection,
        *,
        layer: int,
        kind: HeadKind,
        vocab_size: int,
        owns_projection: bool,
        owns_norm: bool = True,
        temperature: float = 1.0,
        gate: GateKind = "none",
    ) -> None:
        super().__init__(config)
        self.kind, self.tp_group, self.temperature = kind, groups.tp, temperature

        def norm() -> torch.nn.Module:
            return parts.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        if kind == "mlp":
            self.pre_mlp_layernorm = norm()
            self.mlp = build_module(mlp_spec(parts), config=config, tp_group=groups.tp)
        elif kind == "block":
            self.block = build_module(
                layer_spec(parts, config), config=config, layer_number=config.num_layers + layer, pg_collection=groups
            )
        self.norm = norm() if owns_norm else None
        self.output = make_projection(config, groups, vocab_size) if owns_projection else None
        self.gate = None if gate == "none" else Gate(config, parts, groups, gate)

    @property
    def attends(self) -> bool:
        """Whether it needs other positions than its own."""
        return self.kind == "block"

    def features(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """What the projection takes: [S, B, H], normed if the norm is the exit's own. A block attends as layers do."""
        if self.kind == "mlp":
            branch_SBH, _ = self.mlp(self.pre_mlp_layernorm(hidden_SBH))
            hidden_SBH = hidden_SBH + branch_SBH
        elif self.kind == "block":
            hidden_SBH, _ = self.block(hidden_SBH)
        return hidden_SBH if self.norm is None else self.norm(hidden_SBH)


def make_projection(
    config: TransformerConfig, groups: ProcessGroupCollection, vocab_size: int, *, has_weight: bool = True
) -> ColumnParallelLinear:
    """An output projection; its rows are the vocabulary, split over tensor-parallel ranks.

    Args:
        has_weight: False where it borrows the embedding's.
    """
    return ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=True,
        gather_output=False,
        skip_weight_param_allocation=not has_weight,
        tp_group=groups.tp,
    )


def enter_projection(
    features_SBH: torch.Tensor, config: TransformerConfig, groups: ProcessGroupCollection
) -> torch.Tensor:
    """The features of all positions, as every tensor-parallel rank's share of a projection takes them; in the backward
    their gradients are summed over those ranks."""
    if groups.tp.size() == 1:
        return features_SBH
    entered_SBH: torch.Tensor
    if config.sequence_parallel:
        entered_SBH = gather_from_sequence_parallel_region(features_SBH, group=groups.tp)
    else:
        entered_SBH = copy_to_tensor_model_parallel_region(features_SBH, group=groups.tp)
    return entered_SBH
