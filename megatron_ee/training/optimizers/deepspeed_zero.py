"""The backend `deepspeed`: ZeRO stage 1 (Rajbhandari et al., arXiv 1910.02054) around this project's own pipeline.

Of DeepSpeed it is the optimizer alone, without the engine, which would wrap a forward and a backward that the pipeline
runs itself, and which has no ZeRO stage 1 for bf16 with fp32 gradients. DeepSpeed does what follows the backward: it
sums the gradients over data ranks, takes the norm, clips, updates each data rank's share, and gathers the parameters.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_ee.config import OptimizerConfig
from megatron_ee.device import Device
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.adam_state import AdamState, Slot
from megatron_ee.training.optimizers.adamw import DECAYS, open_torch_adamw, set_groups
from megatron_ee.training.optimizers.loss_scale import open_loss_scale, scalers_to_save
from megatron_ee.training.optimizers.weight_decay import split_by_decay

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

BUCKET_SIZE = 50_000_000
"""Gradients that are summed in one message, or one matrix's where that is more."""


class ZeroAdamW:
    """torch's AdamW, of which each data rank has a share.

    Every rank has fp32 copies of its share, in fp32 too; parameters in fp16 also have a dynamic loss scale.
    """

    def __init__(self, stage: Stage, config: OptimizerConfig, mesh: Mesh, gradients: StageGradients) -> None:
        self._config = config
        self._scaler = open_loss_scale(stage.config.params_dtype, config)
        gradients.sums_over_data = False
        trained = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
        self._parameters = list(trained.values())
        groups = _groups(stage, config, mesh)
        for parameter in self._parameters:
            # DeepSpeed's marks of what the norm counts
            parameter.model_parallel = True
            parameter.ds_pipe_replicated = not gradients.counts_in_norm(parameter)
        self._zero = _open_zero(groups, config, mesh)
        self._keeps_apart = stage.config.params_dtype is not torch.float32
        slots = list(_slots(self._zero, trained, mesh))
        self._state = AdamState(slots, scalers_to_save(self._scaler), mesh)

    @property
    def loss_scale(self) -> float:
        """Of the next step; 1 but for fp16."""
        return float(self._scaler.scale)

    def step(self, learning_rate: float) -> float | None:
        """Sum over data ranks, clip, and update; returns the norm of all stages' gradients before clipping, or None
        where it is no number and nothing was updated."""
        zero = self._zero
        set_groups(zero.optimizer, self._config, learning_rate)
        for parameter in self._parameters:
            # another view of the same memory: DeepSpeed may point it elsewhere
            gradient = parameter.main_grad.detach()
            if self._keeps_apart:
                parameter.grad_accum = gradient
            else:
                parameter.grad = gradient
        zero.set_gradient_accumulation_boundary(True)
        zero.setup_buckets()
        zero.reduce_gradients()
        zero.loss_scale = self.loss_scale
        zero.step()
        zero.zero_grad()
        self._scaler.update(zero.overflow)
        gradient_norm = float(zero._global_grad_norm)
        return None if zero.overflow or not math.isfinite(gradient_norm) else gradient_norm

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Moments, and fp32 copies of parameters in half precision, sharded as the parameters in `model_state` are;
        not DeepSpeed's own checkpoint, which no other number of ranks could read."""
        return self._state.sharded(model_state, is_loading=is_loading)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `sharded_state_dict` gave; after the parameters."""
        self._zero.refresh_fp32_params()
        self._state.load(state)


@dataclass(frozen=True, slots=True)
class _Units:
    """What DeepSpeed asks of the process groups (its `mpu`). All ranks that hold parts of one model are as one axis."""

    group: dist.ProcessGroup

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.group)


def _open_zero(groups: list[dict[str, Any]], config: OptimizerConfig, mesh: Mesh) -> "DeepSpeedZeroOptimizer":
    _prepare_deepspeed(mesh.device)
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    parameters = [parameter for group in groups for parameter in group["params"]]
    offloads = config.deepspeed.offload == "cpu"
    pins = mesh.device.torch.type == "cuda"
    largest, together = (function(parameter.numel() for parameter in parameters) for function in (max, sum))
    zero = DeepSpeedZeroOptimizer(
        open_torch_adamw(groups, lr=config.lr),
        {parameter: str(number) for number, parameter in enumerate(parameters)},
        NoopTimer(),
        None,
        clip_grad=config.clip_grad_norm,
        contiguous_gradients=offloads,
        reduce_bucket_size=max(largest, min(together, BUCKET_SIZE)),
        dp_process_group=mesh.groups.dp,
        offload_optimizer_config=DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=pins)
        if offloads
        else None,
        mpu=_Units(mesh.groups.mp),
        gradient_accumulation_dtype=torch.float32,
        communication_data_type=torch.float32,
        gradient_average=False,
        partition_grads=False,
    )
    for hook in zero._grad_acc_hooks:
        hook.remove()  # gradients come from the pipeline, all at once
    for parameter in parameters:
        _unlink(parameter)
    return zero


def _unlink(parameter: torch.nn.Parameter) -> None:
    """Forget what DeepSpeed's own checkpoints and accessors use. It leads from the parameter back to itself in a way
    that hides it from Python's garbage collector: the model and its process groups would stay for good."""
    parameter._hp_mapping = None  # type: ignore[attr-defined]
    for name in [name for name, value in vars(parameter).items() if isinstance(value, MethodType)]:
        delattr(parameter, name)


def _prepare_deepspeed(device: Device) -> None:
    """Import it, quietly, for the device and the process groups that this run has already."""
    with _without_warnings():
        import deepspeed
        from deepspeed import accelerator, comm
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.torch.type == "cpu":
        # it would take any GPU that it sees
        accelerator.set_accelerator(CPU_Accelerator())
    # DeepSpeed would try what this machine's compiler can do, and on CPUs spend a minute on compiling messages through
    # shared memory. It reads from here that there is nothing to compile; torch's messages are as right.
    deepspeed.ops.__compatible_ops__ = {}
    comm.init_distributed(device.backend, auto_mpi_discovery=False, verbose=False)


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _groups(stage: Stage, config: OptimizerConfig, mesh: Mesh) -> list[dict[str, Any]]:
    """Parameters with decay, those without, and each weight that stages share by itself: its copies are laid out alike
    there, and are updated alike to the bit."""
    copies = {name: copy for name, copy in stage.shared_parameters.items() if copy.requires_grad}
    alone = set(copies.values())
    with_decay, without = split_by_decay(config, stage)
    decaying = set(with_decay)
    parts = [
        ([parameter for parameter in with_decay if parameter not in alone], True),
        ([parameter for parameter in without if parameter not in alone], False),
        *(([copies[name]] if name in copies else [], copies.get(name) in decaying) for name in ("output", "norm")),
    ]
    dtype = stage.config.params_dtype
    return [{"params": parameters or [_placeholder(dtype, mesh)], DECAYS: decays} for parameters, decays in parts]


def _placeholder(dtype: torch.dtype, mesh: Mesh) -> torch.nn.Parameter:
    """A number that nothing uses. DeepSpeed sums a norm over stages for each group of parameters, so each stage needs
    all groups, whether it has such parameters or not."""
    placeholder = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=mesh.device.torch))
    placeholder.ds_pipe_replicated = True  # type: ignore[attr-defined]
    return placeholder


def _slots(zero: "DeepSpeedZeroOptimizer", trained: Mapping[str, torch.nn.Parameter], mesh: Mesh) -> Iterator[Slot]:
    """DeepSpeed lays the parameters of a group out one after the other and cuts the whole into as many equal ranges as
    there are data ranks."""
    names = {parameter: name for name, parameter in trained.items()}
    for parameters, main in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        first, offset = mesh.data_rank * main.numel(), 0
        for parameter in parameters:
            start = max(offset, first)
            stop = min(offset + parameter.numel(), first + main.numel())
            if parameter in names:
                span, place = slice(start - offset, stop - offset), slice(start - first, stop - first)
                here = (
                    (main, zero.optimizer, span, place) if start < stop else (None, zero.optimizer, slice(0, 0), None)
                )
                yield Slot(names[parameter], parameter, *here)
            offset += parameter.numel()
