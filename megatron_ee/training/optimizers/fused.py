"""FusedAdam of NVIDIA's Apex and of its Transformer Engine, each of which updates all parameters in one kernel.

Both have one interface, and need a GPU. `requirements` says before anything is built whether they are there.
"""

from typing import Any

import torch

from megatron_ee.config import OptimizerConfig
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.adamw import AdamW


def apex_adamw(stage: Stage, config: OptimizerConfig, mesh: Mesh, gradients: StageGradients) -> AdamW:
    """The backend `apex`."""
    return AdamW(stage, config, mesh, gradients, open_adamw=_open_apex)


def transformer_engine_adamw(stage: Stage, config: OptimizerConfig, mesh: Mesh, gradients: StageGradients) -> AdamW:
    """The backend `transformer_engine`."""
    return AdamW(stage, config, mesh, gradients, open_adamw=_open_transformer_engine)


def _open_apex(groups: list[dict[str, Any]], *, lr: float) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    optimizer: torch.optim.Optimizer = FusedAdam(groups, lr=lr, adam_w_mode=True)
    return optimizer


def _open_transformer_engine(groups: list[dict[str, Any]], *, lr: float) -> torch.optim.Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam

    optimizer: torch.optim.Optimizer = FusedAdam(groups, lr=lr, adam_w_mode=True)
    return optimizer
