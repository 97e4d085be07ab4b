"""The state of megatron-core's Adam in a form that does not depend on how it is kept.

On disk each parameter has `optimizer.state.exp_avg` and `exp_avg_sq` in its own shape, in half precision also
`fp32_param`, and all share one step. In memory it is either that, or flat ranges of it: the distributed optimizer cuts
each gradient bucket into as many equal ranges as there are data ranks. megatron-core's own way back from disk is left
aside: without Transformer Engine and Apex, 0.16.1 fails on an optimizer that has not stepped yet, and makes one `step`
tensor serve all parameters, which then count every step many times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter, and the tensor that the inner optimizer updates for it.

    Attributes:
        main: the parameter itself, its fp32 copy, or this rank's flat range of either; None: other ranks have it all.
        span: what of the flattened parameter `main` is; None: all of it.
    """

    name: str
    parameter: torch.nn.Parameter
    main: torch.Tensor | None
    optimizer: MegatronOptimizer
    span: slice | None = None


class AdamState:
    """Moments, fp32 copies, the step and the loss scale of the optimizers of one stage."""

    def __init__(self, slots: Sequence[_Slot], optimizers: Sequence[MegatronOptimizer], mesh: Mesh) -> None:
        self._slots, self._optimizers, self._mesh = slots, optimizers, mesh

    def sharded(self, model_state: ShardedStateDict, *, is_loading: bool) -> dict[str, Any]:
        """Shards for a checkpoint. Collective over data ranks where they share the state: each parameter's is put
        together in host memory, one after the other, and the first data rank writes it.

        Args:
            is_loading: only the shapes matter.
        """
        self._allocate()
        tensors: dict[str, dict[str, Any]] = {}
        for slot in self._slots:
            values = {
                kind: self._whole(slot, kind, is_loading=is_loading) for kind in (*MOMENTS, *self._masters_of(slot))
            }
            if is_loading or slot.span is None or self._mesh.data_rank == 0:
                entry = model_state[slot.name]
                tensors[slot.name] = {
                    kind: make_sharded_optimizer_tensor(entry, value, f"optimizer.state.{kind}")
                    for kind, value in values.items()
                }
        scalers = [optimizer.grad_scaler.state_dict() for optimizer in self._scaled()]
        return {"tensors": tensors, "step": self._step(), "grad_scaler": scalers[0] if scalers else None}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `sharded` gave, after the parameters have been."""
        self._allocate()
        for slot in self._slots:
            if slot.main is None:
                continue
            for kind, whole in state["tensors"][slot.name].items():
                own = self._own(slot, kind)
                own.copy_(whole if slot.span is None else whole.flatten()[slot.span])
            self._inner(slot)["step"] = torch.tensor(float(state["step"]))
        for optimizer in self._scaled():
            if state["grad_scaler"] is not None:
                optimizer.grad_scaler.load_state_dict(state["grad_scaler"])

    def _allocate(self) -> None:
        """Give an optimizer that has not stepped yet the state that its first step would make."""
        for slot in self._slots:
            if slot.main is not None and not self._inner(slot):
                zeros = {kind: torch.zeros_like(slot.main) for kind in MOMENTS}
                slot.optimizer.optimizer.state[slot.main] = {"step": torch.tensor(0.0), **zeros}

    def _inner(self, slot: _Slot) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = slot.optimizer.optimizer.state[slot.main]
        return state

    def _step(self) -> float:
        """One for all parameters; a stage, or a data rank, without any has none of its own and asks the others."""
        steps = torch.zeros(1, device=self._mesh.device.torch)
        for slot in self._slots:
            if slot.main is not None:
                steps = torch.maximum(steps, self._inner(slot)["step"].to(steps))
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        return float(steps)

    def _masters_of(self, slot: _Slot) -> tuple[str, ...]:
        return (MASTER,) if slot.parameter.dtype != torch.float32 else ()

    def _own(self, slot: _Slot, kind: str) -> torch.Tensor:
        """What this rank holds of a tensor."""
        assert slot.main is not None
        return slot.main.data if kind == MASTER else self._inner(slot)[kind]

    def _whole(self, slot: _Slot, kind: str, *, is_loading: bool) -> torch.Tensor:
        """The tensor in its parameter's shape."""
        if slot.span is None:
            return self._own(slot, kind)
        if is_loading:
            return torch.empty(slot.parameter.shape, dtype=torch.float32)
        whole = torch.zeros(slot.parameter.numel(), device=slot.parameter.device)
        if slot.main is not None:
            whole[slot.span] = self._own(slot, kind)
        dist.all_reduce(whole, group=self._mesh.groups.dp)  # data ranks hold ranges that do not overlap
        return whole.view(slot.parameter.shape).cpu()

    def _scaled(self) -> list[MegatronOptimizer]:
        return [optimizer for optimizer in self._optimizers if getattr(optimizer, "grad_scaler", None) is not None]


def open_adam_state(stage: Stage, optimizers: Sequence[MegatronOptimizer], mesh: Mesh) -> AdamState:
    """The state of the optimizers that update a stage's parameters."""
    names = {parameter: name for name, parameter in stage.named_parameters()}
    slots = [
        slot
        for optimizer in optimizers
        for slot in (_ranges_of if isinstance(optimizer, DistributedOptimizer) else _wholes_of)(optimizer, names)
    ]
    return AdamState(slots, optimizers, mesh)


def _wholes_of(optimizer: MegatronOptimizer, names: dict[torch.nn.Parameter, str]) -> Iterator[_Slot]:
    """Where every data rank has all of the state."""
    copies: dict[torch.Tensor, torch.nn.Parameter] = {}
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            copies.update(zip(mains, models, strict=True))
    for main in optimizer.get_parameters():
        parameter = copies.get(main, main)
        yield _Slot(names[parameter], parameter, main, optimizer)


def _ranges_of(optimizer: DistributedOptimizer, names: dict[torch.nn.Parameter, str]) -> Iterator[_Slot]:
    """Where each data rank has a range of the state, of each parameter in its buckets."""
    for buffer in optimizer.buffers:
        for parameter in buffer.params:
            if parameter not in optimizer.model_param_group_index_map:
                yield _Slot(names[parameter], parameter, None, optimizer, slice(0, 0))
                continue
            group, place = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][place]
            part = optimizer._get_model_param_range_map(parameter)["param"]
            yield _Slot(names[parameter], parameter, main, optimizer, slice(part.start, part.end))
