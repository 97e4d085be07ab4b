"""When an exit fires."""

from collections.abc import Callable, Mapping

import torch

from megatron_ee.config import ExitParams

Measure = Callable[[torch.Tensor], float]
"""Confidence of an exit in [0, 1], from its logits_V."""


def max_probability(logits_V: torch.Tensor) -> float:
    """Confidence of an exit in its likeliest token, in [0, 1]; from the logits as they are, before any sampling."""
    return float(logits_V.float().softmax(-1).max())


MEASURES: Mapping[str, Measure] = {"max_probability": max_probability}


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
