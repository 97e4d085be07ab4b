"""The loss weight of every exit over time (EE-LLM, arXiv 2312.04916, section 3: warm-up and cool-down)."""

import math
from collections.abc import Mapping

from megatron_ee.config import Config, ExitsConfig, WeightScheduleConfig
from megatron_ee.training.curriculum import layerskip_weights


def weights_at(config: Config, iteration: int) -> Mapping[int, float]:
    """Weight of each exit's loss at an iteration (0 is the first). Exits that are not among them have no loss then: in
    a training step they do not run."""
    exits, num_layers = config.exits, config.model.num_layers
    if exits.layerskip is None:
        weights = loss_weights(exits, num_layers, iteration)
        return {layer: weights[layer] for layer in config.trained_exits}
    return layerskip_weights(
        exits.layerskip, exits.layers, num_layers, iteration=iteration, train_iters=config.training.train_iters
    )


def loss_weights(exits: ExitsConfig, num_layers: int, iteration: int) -> Mapping[int, float]:
    """Weight of each exit's loss at an iteration (0 is the first); the final exit's is 1.

    Warm-up (start below target) and cool-down (start above it) are the same formula, and exits may differ in it.
    """
    weights = {
        layer: _weight(exits.weight_schedule_of(layer), target, iteration)
        for layer, target in zip(exits.layers, exits.weights, strict=True)
    }
    return {**weights, num_layers: 1.0}


def _weight(schedule: WeightScheduleConfig, target: float, iteration: int) -> float:
    return schedule.start + _share(schedule, iteration) * (target - schedule.start)


def _share(schedule: WeightScheduleConfig, iteration: int) -> float:
    """How far the weights are from start (0) to target (1)."""
    x = min(1.0, iteration / schedule.warmup_iters) if schedule.warmup_iters else 1.0
    match schedule.shape:
        case "constant":
            return 1.0
        case "linear":
            return x
        case "cosine":
            return (1 - math.cos(math.pi * x)) / 2
