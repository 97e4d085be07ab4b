"""The gradients of one stage: where they accumulate, and their sums over ranks.

Gradients are sums, never means: every loss is divided by the global batch's token count before its backward.
"""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import Layout, stages_with_exits
from megatron_ee.parallel.mesh import Mesh


class StageGradients:
    """megatron-core's gradient buffers around a stage; each parameter's fp32 gradient is its `main_grad`.

    Collective: every rank builds it and calls its methods together.

    Args:
        layout: of all stages, to find which of them hold a copy of the shared output projection.
    """

    def __init__(self, stage: Stage, mesh: Mesh, layout: Layout) -> None:
        self.ddp = DistributedDataParallel(
            stage.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False),
            stage,
            pg_collection=mesh.groups,
        )
        self._stage, self._mesh = stage, mesh
        self._projection: torch.nn.Parameter | None = stage.output.weight if stage.output is not None else None
        self._projection_owners = mesh.group_over_stages(stages_with_exits(layout))
        self._of_split_positions = [
            parameter for parameter in stage.parameters() if getattr(parameter, "sequence_parallel", False)
        ]

    def zero(self) -> None:
        """Before a step's first backward."""
        self.ddp.zero_grad_buffer()

    def reduce(self) -> None:
        """Sum over data-parallel ranks, then over the stages that hold a copy of the shared projection; and what sees
        only its rank's share of the positions, over tensor-parallel ranks."""
        self.ddp.finish_grad_sync()
        if self._of_split_positions:
            together = torch.cat([_gradient(parameter).flatten() for parameter in self._of_split_positions])
            dist.all_reduce(together, group=self._mesh.groups.tp)
            sizes = [parameter.numel() for parameter in self._of_split_positions]
            for parameter, summed in zip(self._of_split_positions, torch.split(together, sizes), strict=True):
                _gradient(parameter).copy_(summed.view_as(parameter))
        if self._projection is not None:
            dist.all_reduce(_gradient(self._projection), group=self._projection_owners)

    def norm(self) -> float:
        """The 2-norm over all stages; what several ranks hold counts once. After `reduce`."""
        own = [_gradient(parameter) for parameter in self._stage.parameters() if self._counts(parameter)]
        return float(get_grad_norm_fp32(own, grad_stats_parallel_group=self._mesh.groups.mp))

    def _counts(self, parameter: torch.nn.Parameter) -> bool:
        return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
            parameter, self._mesh.groups.tp
        )


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient
