"""What exits should say of a text: formulas written out in fp64, on one pass without a cache.

Shapes: S positions, V the vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_ee.model.stage import Stage


def of_logits(measure: str, logits_V: np.ndarray) -> float:
    odds_V = np.exp(logits_V - logits_V.max())
    shares_V = np.sort(odds_V / odds_V.sum())[::-1]
    if measure == "entropy":
        return float(1 + (shares_V * np.log(shares_V)).sum() / np.log(len(shares_V)))
    return float(shares_V[0] - (shares_V[1] if measure == "margin" else 0))


def of_states(output_H: np.ndarray, previous_H: np.ndarray) -> float:
    return float(max(0, output_H @ previous_H / np.sqrt((output_H @ output_H) * (previous_H @ previous_H))))


def of_gate(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


@dataclass(frozen=True, slots=True)
class SaidAtExit:
    """By one exit, at all positions."""

    logits_SV: np.ndarray
    output_SH: np.ndarray
    previous_SH: np.ndarray
    gate_logits_S: np.ndarray | None

    def choice(self, position: int) -> int:
        return int(self.logits_SV[position].argmax())

    def confidence(self, measure: str, position: int) -> float:
        if measure == "gate":
            assert self.gate_logits_S is not None
            return of_gate(self.gate_logits_S[position])
        if measure == "cosine":
            return of_states(self.output_SH[position], self.previous_SH[position])
        return of_logits(measure, self.logits_SV[position])


@torch.no_grad()
def said_at_exits(stage: Stage, tokens: Sequence[int], exits: Sequence[int]) -> dict[int, SaidAtExit]:
    """Of the model's exits, and of the final one.

    Args:
        exits: all of the model's: each one's hidden state is compared with that of the one before.
    """
    positions = torch.arange(len(tokens))
    x_SBH, said = stage.embed(torch.tensor([tokens])), {}
    for start, stop in pairwise((0, *exits, stage.model.num_layers)):
        y_SBH, taps = stage.run_layers(x_SBH, positions, start, stop)
        hidden_SBH = taps[stage.tap_of(stop)]
        logits_SBV = stage.exit_logits(hidden_SBH, stop, positions)
        has_gate = stage.head(stop).gate is not None
        gates_S = stage.gate_logits(hidden_SBH, stop)[:, 0].double().numpy() if has_gate else None
        values = (value[:, 0].double().numpy() for value in (logits_SBV, y_SBH, x_SBH))
        said[stop], x_SBH = SaidAtExit(*values, gates_S), y_SBH
    return said
