"""An exit: a norm and an output projection that turn a hidden state into logits."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ee.model.layers import LayerParts


class ExitHead(MegatronModule):
    """Norm, then projection. The final output is an exit like the others.

    Args:
        shared_projection: the projection that all exits share; None: this exit has its own, `output`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parts: LayerParts,
        groups: ProcessGroupCollection,
        *,
        vocab_size: int,
        shared_projection: ColumnParallelLinear | None,
    ) -> None:
        super().__init__(config)
        self.tp_group = groups.tp
        self.norm = parts.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        if shared_projection is None:
            self.output = make_projection(config, groups, vocab_size)

    def forward(self, hidden_SBH: torch.Tensor, shared_projection: ColumnParallelLinear | None) -> torch.Tensor:
        """logits_SBV of the hidden states, by the exit's own projection or else the shared one."""
        projection = shared_projection if shared_projection is not None else self.output
        logits_SBV, _ = projection(self.norm(hidden_SBH))
        return logits_SBV


def make_projection(config: TransformerConfig, groups: ProcessGroupCollection, vocab_size: int) -> ColumnParallelLinear:
    """An output projection; its rows are the vocabulary, split over tensor-parallel ranks."""
    return ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=True,
        gather_output=False,
        tp_group=groups.tp,
    )
