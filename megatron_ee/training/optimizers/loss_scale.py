"""The loss scale of fp16, megatron-core's for every backend, so that a run goes on with any."""

import torch
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler

from megatron_ee.config import OptimizerConfig

# megatron-core's own defaults
GROWTH_INTERVAL, HYSTERESIS = 1000, 2


def open_loss_scale(dtype: torch.dtype, config: OptimizerConfig) -> MegatronGradScaler:
    """Dynamic for fp16: halved when gradients overflow again and again, doubled after 1000 steps without. Else 1."""
    if dtype is not torch.float16:
        return ConstantGradScaler(1.0)
    return DynamicGradScaler(
        config.initial_loss_scale,
        min_scale=1.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=GROWTH_INTERVAL,
        hysteresis=HYSTERESIS,
    )


def scalers_to_save(scaler: MegatronGradScaler) -> list[MegatronGradScaler]:
    """What has a state."""
    return [scaler] if isinstance(scaler, DynamicGradScaler) else []
