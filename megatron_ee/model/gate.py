"""A gate: a small head that says how sure it is that its exit is right, without a product with the vocabulary.

It reads the hidden state at its exit's tap, through a norm of its own. Its parameters are whole on every
tensor-parallel rank, as norms are. It learns from the state and never changes it: see `Gate.forward`.

Shapes: S positions, B sequences, H hidden size, G inner width.
"""

from typing import cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu
from torch.nn.utils import skip_init

from megatron_ee.config import GateKind
from megatron_ee.model.layers import LayerParts
from megatron_ee.parallel.products import gate_width


class Gate(torch.nn.Module):
    """norm, then H -> 1 (linear), or H -> H / 4 -> 1 with SiLU (mlp). With biases."""

    def __init__(
        self, config: TransformerConfig, parts: LayerParts, groups: ProcessGroupCollection, kind: GateKind
    ) -> None:
        super().__init__()
        self._config, self._groups = config, groups
        self.norm = parts.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        width = config.hidden_size
        self.hidden: torch.nn.Module | None = None
        if kind == "mlp":
            width = gate_width(config.hidden_size)
            self.hidden = _linear(config, config.hidden_size, width)
        self.output = _linear(config, width, 1)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            # What is `shared` stays out of the gradient's norm: clipping must not let a gate slow the model down.
            parameter.shared = True  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Logits of "this exit is right" at all positions, whichever this rank has: fp32 [S, B].

        The state is detached: the model is trained to predict tokens, as without a gate.
        """
        x_SBG = self.norm(hidden_SBH.detach())
        if self.hidden is not None:
            x_SBG = silu(self.hidden(x_SBG))
        logits_SB1 = self.output(x_SBG).float()
        if self._config.sequence_parallel:
            # every rank takes the loss of all positions, so each one's gradient is its own share of it
            logits_SB1 = gather_from_sequence_parallel_region(
                logits_SB1, tensor_parallel_output_grad=False, group=self._groups.tp
            )
        return cast(torch.Tensor, logits_SB1[..., 0])


def _linear(config: TransformerConfig, inputs: int, outputs: int) -> torch.nn.Module:
    """Left as it is, for `initialize` to fill by name."""
    return cast(
        torch.nn.Module,
        skip_init(torch.nn.Linear, inputs, outputs, dtype=config.params_dtype),  # type: ignore[no-untyped-call]
    )
