"""AdamW by torch's interface for optimizers: torch's own, and others that have the same."""

import math
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_ee.config import OptimizerConfig
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.adam_state import AdamState, Slot
from megatron_ee.training.optimizers.loss_scale import open_loss_scale, scalers_to_save
from megatron_ee.training.optimizers.weight_decay import split_by_decay

DECAYS = "decays"
"""Key of a parameter group: whether its parameters do."""


class OpenAdamW(Protocol):
    """An optimizer of fp32 tensors, whose decay is apart from the gradients (AdamW). Groups have `lr`, `betas`, `eps`
    and `weight_decay`; every tensor that has stepped has `exp_avg` and `exp_avg_sq`."""

    def __call__(self, groups: list[dict[str, Any]], *, lr: float) -> torch.optim.Optimizer: ...


class AdamW:
    """Updates a stage with a library's AdamW. Every data rank has all of the state and makes the same step.

    Parameters in half precision have an fp32 copy, which is what is updated; those in fp16 also a dynamic loss scale.
    """

    def __init__(
        self,
        stage: Stage,
        config: OptimizerConfig,
        mesh: Mesh,
        gradients: StageGradients,
        *,
        open_adamw: OpenAdamW,
    ) -> None:
        self._config, self._gradients = config, gradients
        trained = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
        self._mains = {parameter: _main_of(parameter) for parameter in trained.values()}
        groups = [
            {"params": [self._mains[parameter] for parameter in parameters], DECAYS: decays}
            for decays, parameters in zip((True, False), split_by_decay(config, stage), strict=True)
            if parameters
        ]
        self._optimizer = open_adamw(groups, lr=config.lr) if groups else None  # a stage may have nothing to train
        self._scaler = open_loss_scale(stage.config.params_dtype, config)
        slots = [
            Slot(name, parameter, self._mains[parameter], self._optimizer)
            for name, parameter in trained.items()
            if self._optimizer is not None
        ]
        self._state = AdamState(slots, scalers_to_save(self._scaler), mesh)

    @property
    def loss_scale(self) -> float:
        """Of the next step; 1 but for fp16."""
        return float(self._scaler.scale)

    @torch.no_grad()
    def step(self, learning_rate: float) -> float | None:
        """Clip, and update the parameters; returns the norm of all stages' gradients before clipping, or None where
        it is no number and nothing was updated."""
        loss_scale = self.loss_scale
        gradient_norm = self._gradients.norm() / loss_scale
        is_finite = math.isfinite(gradient_norm)
        self._scaler.update(not is_finite)
        if not is_finite:
            return None
        if self._optimizer is not None:
            set_groups(self._optimizer, self._config, learning_rate)
            self._update(self._optimizer, clip_factor(self._config, gradient_norm) / loss_scale)
        return gradient_norm

    def _update(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        gradients = [parameter.main_grad for parameter in self._mains]
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for main, gradient in zip(self._mains.values(), gradients, strict=True):
            main.grad = gradient
        optimizer.step()
        for parameter, main in self._mains.items():
            main.grad = None
            if main is not parameter:
                parameter.copy_(main)

    def sharded_state_dict(self, model_state: ShardedStateDict, *, is_loading: bool = False) -> dict[str, Any]:
        """Moments, and fp32 copies, sharded as the parameters in `model_state` are."""
        return self._state.sharded(model_state, is_loading=is_loading)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `sharded_state_dict` gave; after the parameters."""
        self._state.load(state)


def torch_adamw(stage: Stage, config: OptimizerConfig, mesh: Mesh, gradients: StageGradients) -> AdamW:
    """The backend `torch`: torch.optim.AdamW, in one kernel for all parameters."""
    return AdamW(stage, config, mesh, gradients, open_adamw=open_torch_adamw)


def open_torch_adamw(groups: list[dict[str, Any]], *, lr: float) -> torch.optim.Optimizer:
    """torch's, which has fused kernels for CPUs as for GPUs."""
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_groups(optimizer: torch.optim.Optimizer, config: OptimizerConfig, learning_rate: float) -> None:
    """What the next step is made with: the config's settings, also after a resume."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["betas"] = (config.beta1, config.beta2)
        group["eps"] = config.epsilon
        group["weight_decay"] = config.weight_decay if group[DECAYS] else 0.0


def clip_factor(config: OptimizerConfig, gradient_norm: float) -> float:
    """What gradients are multiplied by, as megatron-core has it."""
    return min(1.0, (config.clip_grad_norm or math.inf) / (gradient_norm + 1e-6))


def _main_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 tensor that is updated."""
    return parameter if parameter.dtype == torch.float32 else parameter.detach().clone().float()
