"""LayerSkip's formulas (Elhoushi et al., arXiv 2404.16710): how often layers are skipped, and what exits weigh.

The paper counts layers from l = 0 to L - 1 and iterations from t = 0 to T - 1, and so does this file. What is called
the exit after E layers elsewhere is its l = E - 1.
"""

import math
from collections.abc import Mapping, Sequence

from megatron_ee.config import LayerDropoutConfig, LayerSkipConfig


def depth_scale(shape: str, layer: int, num_layers: int) -> float:
    """D(l), from 0 at the first layer to 1 at the last; uniform: 1 everywhere. One layer alone is a first one."""
    x = layer / (num_layers - 1) if num_layers > 1 else 0.0
    match shape:
        case "exponential":
            return math.exp(x * math.log(2)) - 1
        case "linear":
            return x
        case "sqrt":
            return math.sqrt(x)
        case "uniform":
            return 1.0
    raise ValueError(f"no shape {shape!r}")


def time_scale(curriculum: str, iteration: int, train_iters: int) -> float:
    """S(t), exponential: from 0 in the first iteration to 1 in the last. A run of one iteration has only a first."""
    if curriculum == "none":
        return 1.0
    return depth_scale(curriculum, iteration, train_iters)


def dropout_probabilities(
    settings: LayerDropoutConfig, num_layers: int, *, iteration: int, train_iters: int
) -> list[float]:
    """p_{l,t} = S(t) D(l) p_max, for each layer l."""
    so_far = time_scale(settings.curriculum, iteration, train_iters) * settings.maximum
    return [so_far * depth_scale(settings.shape, layer, num_layers) for layer in range(num_layers)]


def exit_scale(layer: int, num_layers: int, scale: float) -> float:
    """e(l) = e_scale (0 + ... + l) before the last layer, and e(L-1) = (L - 1) + e_scale (0 + ... + L-2)."""
    if layer == num_layers - 1:
        return layer + scale * (layer - 1) * layer / 2
    return scale * layer * (layer + 1) / 2


def is_enabled(settings: LayerSkipConfig, layer: int, num_layers: int, *, iteration: int, train_iters: int) -> bool:
    """C(t, l), the curriculum; the last layer's is always 1.

    rotational: every R-th layer, shifted by one in each iteration, so that each has its turn once in R.
    gradual: from the last layer downward, one more every T / (2 L) iterations.
    """
    last = num_layers - 1
    if layer == last:
        return True
    match settings.curriculum:
        case "none":
            return True
        case "rotational":
            assert settings.rotation is not None
            return (layer - iteration) % settings.rotation == 0
        case "gradual":
            return layer >= last - 2 * num_layers * iteration // train_iters


def layerskip_weights(
    settings: LayerSkipConfig, exits: Sequence[int], num_layers: int, *, iteration: int, train_iters: int
) -> Mapping[int, float]:
    """e~(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i) over the exits that there are.

    Args:
        exits: after how many layers, without the final one.

    Returns:
        The weights above 0, by exit, the final one's always among them: they sum to 1. (The exit after the first
        layer has none: e(0) = 0.)
    """
    scales = {
        layer + 1: exit_scale(layer, num_layers, settings.scale)
        for layer in (*(exit_ - 1 for exit_ in exits), num_layers - 1)
        if is_enabled(settings, layer, num_layers, iteration=iteration, train_iters=train_iters)
    }
    total = sum(scales.values())
    if not total:
        return {num_layers: 1.0}  # a model of one layer
    weights = {exit_: scale / total for exit_, scale in scales.items()}
    return {exit_: weight for exit_, weight in weights.items() if weight}
