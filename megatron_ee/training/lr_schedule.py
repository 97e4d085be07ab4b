"""The learning rate over time: a linear warm-up, then one of several decays."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_ee.config import OptimizerConfig

Decay = Callable[[OptimizerConfig, int, int], float]
"""(config, step, num_steps) -> how much of the way from `min_lr` (0) to `lr` (1) is left at `step` of the `num_steps`
after the warm-up."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The rate of every iteration of a run; a pure function, so that a resumed run needs no state of it."""

    config: OptimizerConfig
    train_iters: int
    decay: Decay

    def __call__(self, iteration: int) -> float:
        """The rate of the step at `iteration` (0 is the first)."""
        config, warmup = self.config, self.config.lr_warmup_iters
        if iteration < warmup:
            return config.lr * (iteration + 1) / warmup
        share = self.decay(config, iteration - warmup, max(1, self.train_iters - warmup))
        return config.min_lr + (config.lr - config.min_lr) * share


def cosine(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Half a cosine (Loshchilov and Hutter, arXiv 1608.03983)."""
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def linear(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """A straight line."""
    return 1 - step / num_steps


def wsd(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak rate, then a line down over the last
    `lr_cooldown_iters`."""
    return min(1.0, (num_steps - step) / config.lr_cooldown_iters)


def constant(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The peak rate to the end."""
    return 1.0


DECAYS: Mapping[str, Decay] = {"cosine": cosine, "linear": linear, "wsd": wsd, "constant": constant}
