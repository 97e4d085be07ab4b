"""The gradients of one stage: where they accumulate, and their sums over ranks.

Gradients are sums, never means: every loss is divided by the global batch's token count before its backward.
"""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.transformer.module import param_is_not_shared

from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import StageLayout
from megatron_ee.parallel.mesh import Mesh


class StageGradients:
    """megatron-core's gradient buffers around a stage; each parameter's fp32 gradient is its `main_grad`.

    Collective: every rank builds it and calls its methods together.

    Args:
        layouts: all stages' layouts, to find which of them hold a copy of the shared output projection.
    """

    def __init__(self, stage: Stage, mesh: Mesh, layouts: tuple[StageLayout, ...]) -> None:
        self.ddp = DistributedDataParallel(
            stage.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False),
            stage,
            pg_collection=mesh.groups,
        )
        self._stage, self._mesh = stage, mesh
        owners = [number for number, layout in enumerate(layouts) if layout.exits]
        self._projection: torch.nn.Parameter | None = stage.output.weight if stage.output is not None else None
        self._projection_owners = mesh.group_over_stages(owners)

    def zero(self) -> None:
        """Before a step's first backward."""
        self.ddp.zero_grad_buffer()

    def reduce(self) -> None:
        """Sum over data-parallel ranks, then over the stages that hold a copy of the shared projection."""
        self.ddp.finish_grad_sync()
        if self._projection is not None:
            gradient: torch.Tensor = self._projection.main_grad  # type: ignore[attr-defined]
            dist.all_reduce(gradient, group=self._projection_owners)

    def norm(self) -> float:
        """The 2-norm over all stages; a copy of the shared projection counts once. After `reduce`."""
        own = [parameter.main_grad for parameter in self._stage.parameters() if param_is_not_shared(parameter)]
        return float(get_grad_norm_fp32(own, grad_stats_parallel_group=self._mesh.groups.mp))
