"""The state of Adam in a form that does not depend on whose Adam it is, nor on how that keeps it.

On disk each parameter has `optimizer.state.exp_avg` and `exp_avg_sq` in its own shape, in half precision also
`fp32_param`, and all share one step. In memory it is either that, or flat ranges of it that data ranks share. So a run
of any backend goes on from a checkpoint of any other's, in any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.grad_scaler import MegatronGradScaler

from megatron_ee.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter, and the fp32 tensor that an optimizer updates for it.

    Attributes:
        main: the parameter itself, its fp32 copy, or a flat range that has a part of either in it; None: other data
            ranks have it all.
        optimizer: has the moments of `main`, of its shape.
        span: what of the flattened parameter is here; None: all of it.
        place: where in `main` that is; None: everywhere.
    """

    name: str
    parameter: torch.nn.Parameter
    main: torch.Tensor | None
    optimizer: torch.optim.Optimizer
    span: slice | None = None
    place: slice | None = None


class AdamState:
    """Moments, fp32 copies, the step and the loss scale of the optimizers of one stage."""

    def __init__(self, slots: Sequence[Slot], scalers: Sequence[MegatronGradScaler], mesh: Mesh) -> None:
        self._slots, self._scalers, self._mesh = slots, scalers, mesh

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
        scalers = [scaler.state_dict() for scaler in self._scalers]
        return {"tensors": tensors, "step": self._step(), "grad_scaler": scalers[0] if scalers else None}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `sharded` gave, after the parameters have been."""
        self._allocate()
        for slot in self._slots:
            if slot.main is None:
                continue
            for kind, whole in state["tensors"][slot.name].items():
                self._own(slot, kind).copy_(whole if slot.span is None else whole.flatten()[slot.span])
            _set_step(slot, float(state["step"]))
        for scaler in self._scalers:
            if state["grad_scaler"] is not None:
                scaler.load_state_dict(state["grad_scaler"])

    def _allocate(self) -> None:
        """Give an optimizer that has not stepped yet the state that its first step would make."""
        for slot in self._slots:
            if slot.main is not None and not slot.optimizer.state[slot.main]:
                slot.optimizer.state[slot.main] = {kind: torch.zeros_like(slot.main) for kind in MOMENTS}
                _set_step(slot, _step_of(slot))

    def _step(self) -> float:
        """One for all parameters; a stage, or a data rank, without any has none of its own and asks the others."""
        own = max((_step_of(slot) for slot in self._slots if slot.main is not None), default=0.0)
        steps = torch.tensor([own], device=self._mesh.device.torch)
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        return float(steps)

    def _masters_of(self, slot: Slot) -> tuple[str, ...]:
        return (MASTER,) if slot.parameter.dtype != torch.float32 else ()

    def _own(self, slot: Slot, kind: str) -> torch.Tensor:
        """What this rank holds of a tensor."""
        assert slot.main is not None
        tensor = slot.main.data if kind == MASTER else slot.optimizer.state[slot.main][kind]
        return tensor if slot.place is None else tensor[slot.place]

    def _whole(self, slot: Slot, kind: str, *, is_loading: bool) -> torch.Tensor:
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


def _keeps_steps_apart(optimizer: torch.optim.Optimizer) -> bool:
    """torch's has a step for each tensor; fused ones of other libraries have one for each group of parameters."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _step_of(slot: Slot) -> float:
    assert slot.main is not None
    if _keeps_steps_apart(slot.optimizer):
        return float(slot.optimizer.state[slot.main].get("step", 0.0))
    return float(max(group.get("step", 0) for group in slot.optimizer.param_groups))


def _set_step(slot: Slot, step: float) -> None:
    assert slot.main is not None
    if _keeps_steps_apart(slot.optimizer):
        # a fused step of torch's looks for it where the parameter is
        is_fused = any(group.get("fused") for group in slot.optimizer.param_groups)
        device = slot.main.device if is_fused else None
        slot.optimizer.state[slot.main]["step"] = torch.tensor(step, device=device)
        return
    for group in slot.optimizer.param_groups:
        group["step"] = int(step)
