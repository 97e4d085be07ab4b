"""When an exit fires."""

from collections.abc import Callable, Collection, Mapping

import torch

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError

Measure = Callable[[torch.Tensor], float]
"""Confidence of an exit in [0, 1], from its logits_V."""

GATE: Measure | None = None
"""What stands for a measure where an exit's gate is asked: it looks at the hidden state, and needs no logits."""


def max_probability(logits_V: torch.Tensor) -> float:
    """Confidence of an exit in its likeliest token, in [0, 1]; from the logits as they are, before any sampling."""
    return float(logits_V.float().softmax(-1).max())


MEASURES: Mapping[str, Measure | None] = {"max_probability": max_probability, "gate": GATE}


def fires(confidence: float, threshold: float) -> bool:
    """A threshold of 1 never fires, though a rounded softmax may be 1; NaN never fires either."""
    return threshold < 1 and confidence >= threshold


def thresholds_of(params: ExitParams, exits: list[int]) -> dict[int, float]:
    """The exits that may fire for a request, and the confidence each needs.

    Raises:
        ValueError: the request names an exit that the model doesn't have.
    """
    named = {*(params.exits or ()), *params.thresholds}
    if unknown := named - set(exits):
        raise ValueError(f"inference.exit: the model has exits after layers {exits}, none after {sorted(unknown)}")
    if params.mode == "full":
        return {}
    allowed = exits if params.exits is None else params.exits
    thresholds = {layer: params.thresholds.get(layer, params.threshold) for layer in allowed}
    return {layer: value for layer, value in thresholds.items() if layer >= params.min_exit and value < 1}


def check_gates(layers: Collection[int], gated: Collection[int]) -> None:
    """
    Args:
        layers: the exits that may fire for a request that asks their gates.
        gated: the model's exits with a gate.

    Raises:
        FieldError: one of them has no gate.
    """
    if lacking := sorted(set(layers) - set(gated)):
        which = f"only after {sorted(gated)}" if gated else "none at all"
        raise FieldError(
            "inference.exit.measure", f"gate, but the model has no gate after layers {lacking}, {which} (exits.gate)"
        )
