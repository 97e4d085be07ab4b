"""Optimizer backends: what updates a stage's parameters from its gradients."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_ee.config import OptimizerConfig
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.adamw import torch_adamw
from megatron_ee.training.optimizers.deepspeed_zero import ZeroAdamW
from megatron_ee.training.optimizers.fused import apex_adamw, transformer_engine_adamw
from megatron_ee.training.optimizers.megatron import MegatronAdamW
from megatron_ee.training.optimizers.requirements import check_backend

__all__ = ["BACKENDS", "Backend", "OptimizerBackend", "check_backend"]


class OptimizerBackend(Protocol):
    """Updates one stage's parameters. All ranks call the same methods together."""

    @property
    def loss_scale(self) -> float:
        """What the next step's losses are multiplied by before their backward; 1 unless small gradients of fp16 would
        vanish."""
        ...

    def step(self, learning_rate: float) -> float | None:
        """Update from each parameter's `main_grad` (fp32, summed over all ranks, times `loss_scale`).

        Returns:
            The gradient norm over all stages, before clipping and without the loss scale; None, on all ranks, where it
            is no number: then nothing was updated, and the next loss scale may be lower.
        """
        ...

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """The backend's state for a checkpoint, as shards like those of `model_state`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `sharded_state_dict` gave."""
        ...


Backend = Callable[[Stage, OptimizerConfig, Mesh, StageGradients], OptimizerBackend]

BACKENDS: Mapping[str, Backend] = {
    "megatron": MegatronAdamW,
    "torch": torch_adamw,
    "deepspeed": ZeroAdamW,
    "apex": apex_adamw,
    "transformer_engine": transformer_engine_adamw,
}
