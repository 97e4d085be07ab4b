"""The learning rate over time."""

import math

from megatron_ee.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, train_iters: int, iteration: int) -> float:
    """The rate of the step at `iteration` (0 is the first): linear warm-up, then cosine decay to `min_lr`, or none."""
    warmup = optimizer.lr_warmup_iters
    if iteration < warmup:
        return optimizer.lr * (iteration + 1) / warmup
    if optimizer.lr_decay == "constant":
        return optimizer.lr
    progress = (iteration - warmup) / max(1, train_iters - warmup)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * (1 + math.cos(math.pi * progress)) / 2
