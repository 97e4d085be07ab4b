"""The default backend: megatron-core's AdamW, with its clipping; plain, or with its state shared by data ranks."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_ee.config import OptimizerConfig
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.adam_state import AdamState, Slot
from megatron_ee.training.optimizers.weight_decay import has_decay


class MegatronAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). Parameters without decay are a group of their own.

    Parameters in half precision have an fp32 copy, which is what is updated; those in fp16 also a dynamic loss scale.
    """

    def __init__(self, stage: Stage, config: OptimizerConfig, mesh: Mesh, gradients: StageGradients) -> None:
        self._config = config
        dtype = stage.config.params_dtype
        self._optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                params_dtype=dtype,
                bf16=dtype is torch.bfloat16,
                fp16=dtype is torch.float16,
                use_distributed_optimizer=gradients.ddp.ddp_config.use_distributed_optimizer,
                initial_loss_scale=config.initial_loss_scale,
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.epsilon,
                clip_grad=config.clip_grad_norm or math.inf,  # it measures the norm only where it may clip
            ),
            [gradients.ddp],
            config_overrides={_without_decay(config, stage): ParamGroupOverride(wd_mult=0.0)},
            use_gloo_process_groups=False,
            pg_collection=mesh.groups,
        )
        for group in self._optimizer.param_groups:
            if mesh.device.torch.type == "cpu" and "fused" in group:  # torch's AdamW, which would loop over operators
                group["fused"] = True
        self._state = _open_state(stage, self._optimizer.chained_optimizers, mesh)

    @property
    def loss_scale(self) -> float:
        """Of the next step; 1 but for fp16."""
        return float(self._optimizer.get_loss_scale())

    def step(self, learning_rate: float) -> float | None:
        """Clip, and update the parameters; returns the norm of all stages' gradients before clipping, or None where
        it is no number and nothing was updated."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["betas"] = (self._config.beta1, self._config.beta2)  # the config's, also after a resume
            group["eps"] = self._config.epsilon
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
        gradient_norm = self._update()
        self._optimizer.zero_grad()
        return gradient_norm

    def _update(self) -> float | None:
        """megatron-core's own step, but for gradients that are no numbers: those it would go along with."""
        if self._optimizer.prepare_grads():
            return None
        gradient_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(gradient_norm):
            return None
        for optimizer in self._optimizer.chained_optimizers:
            if not optimizer.is_stub_optimizer and (parameters := optimizer.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, max_norm=optimizer.config.clip_grad, total_norm=gradient_norm)
        self._optimizer.step_with_ready_grads()
        return gradient_norm

    def sharded_state_dict(self, model_state: ShardedStateDict, *, is_loading: bool = False) -> dict[str, Any]:
        """Moments, and fp32 copies, sharded as the parameters in `model_state` are; the same whether data ranks share
        them or not, so that any run can go on from any other's."""
        return self._state.sharded(model_state, is_loading=is_loading)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `sharded_state_dict` gave; after the parameters."""
        self._state.load(state)


def _without_decay(config: OptimizerConfig, stage: Stage) -> ParamKey:
    def matches(parameter: torch.nn.Parameter, name: str) -> bool:
        return not has_decay(config, stage, name.removeprefix("module."), parameter)

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name="without_decay", fn=matches))


def _open_state(stage: Stage, optimizers: Sequence[MegatronOptimizer], mesh: Mesh) -> AdamState:
    """The state of the optimizers that update a stage's parameters.

    megatron-core's own way back from disk is left aside: without Transformer Engine and Apex, 0.16.1 fails on an
    optimizer that has not stepped yet, and makes one `step` tensor serve all parameters, which then count every step
    many times.
    """
    names = {parameter: name for name, parameter in stage.named_parameters()}
    slots = [
        slot
        for optimizer in optimizers
        for slot in (_ranges_of if isinstance(optimizer, DistributedOptimizer) else _wholes_of)(optimizer, names)
    ]
    scalers = [getattr(optimizer, "grad_scaler", None) for optimizer in optimizers]
    return AdamState(slots, [scaler for scaler in scalers if scaler is not None], mesh)


def _wholes_of(optimizer: MegatronOptimizer, names: dict[torch.nn.Parameter, str]) -> Iterator[Slot]:
    """Where every data rank has all of the state."""
    copies: dict[torch.Tensor, torch.nn.Parameter] = {}
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            copies.update(zip(mains, models, strict=True))
    for main in optimizer.get_parameters():
        parameter = copies.get(main, main)
        yield Slot(names[parameter], parameter, main, optimizer.optimizer)


def _ranges_of(optimizer: DistributedOptimizer, names: dict[torch.nn.Parameter, str]) -> Iterator[Slot]:
    """Where each data rank has a range of the state, of each parameter in its buckets: the distributed optimizer cuts
    each gradient bucket into as many equal ranges as there are data ranks."""
    for buffer in optimizer.buffers:
        for parameter in buffer.params:
            if parameter not in optimizer.model_param_group_index_map:
                yield Slot(names[parameter], parameter, None, optimizer.optimizer, slice(0, 0))
                continue
            group, place = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][place]
            part = optimizer._get_model_param_range_map(parameter)["param"]
            yield Slot(names[parameter], parameter, main, optimizer.optimizer, slice(part.start, part.end))
