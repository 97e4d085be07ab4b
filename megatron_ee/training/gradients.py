"""The gradients of one stage: where they accumulate, and their sums over ranks.

Gradients are sums, never means: every loss is divided by the global batch's token count before its backward.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_ee.config import ParallelConfig
from megatron_ee.model.layers import HEAD_NORMS
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.overlap import OverlappingSums


class StageGradients:
    """megatron-core's gradient buffers around a stage; each parameter's fp32 gradient is its `main_grad`.

    Collective: every rank builds it and calls its methods together.

    Args:
        parallel: whether data ranks share the optimizer's state, and whether their sums overlap the backward.
        varies: whether it depends on the step and the data rank which parameters get a gradient.
    """

    def __init__(self, stage: Stage, mesh: Mesh, parallel: ParallelConfig, *, varies: bool = False) -> None:
        buffers = OverlappingSums if varies and parallel.overlap_grad_reduce else DistributedDataParallel
        self.ddp = buffers(
            stage.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                use_distributed_optimizer=parallel.distributed_optimizer,
                delay_wgrad_compute=stage.weight_products is not None,
            ),
            stage,
            pg_collection=mesh.groups,
        )
        self._mesh, self._parallel = mesh, parallel
        self._trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        self._shared: list[tuple[torch.nn.Parameter, dist.ProcessGroup]] = []
        copies = {name: copy for name, copy in stage.shared_parameters.items() if copy.requires_grad}
        for name in ("output", "norm"):
            owners = _open_group_of_owners(name in copies, mesh)
            if name in copies and owners is not None:
                self._shared.append((copies[name], owners))
        self._of_shares = [
            parameter
            for name, parameter in stage.named_parameters()
            if parameter.requires_grad and mesh.tensor_size > 1 and _sees_a_share(name, parameter)
        ]

    @property
    def no_sync(self) -> Callable[[], AbstractContextManager[None]]:
        """A context for backwards that are not the last: a gradient computed in it is not handed over yet."""
        return self.ddp.no_sync if self._parallel.overlap_grad_reduce else nullcontext

    def settle(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """They get no more gradient in this step; where sums overlap and it varies who gets one, theirs may begin."""
        if isinstance(self.ddp, OverlappingSums):
            self.ddp.settle(parameters)

    def zero(self) -> None:
        """Before a step's first backward."""
        self.ddp.zero_grad_buffer()

    def reduce(self, factor: float = 1.0) -> None:
        """Sum over data-parallel ranks and multiply by this stage's factor; then sum over the stages that hold a copy
        of a shared weight; and what sees only its rank's share of positions or heads, over tensor-parallel ranks."""
        self.ddp.finish_grad_sync()
        if factor != 1.0:
            self.ddp.scale_gradients(factor)
        if self._of_shares:
            together = torch.cat([_gradient(parameter).flatten() for parameter in self._of_shares])
            dist.all_reduce(together, group=self._mesh.groups.tp)
            sizes = [parameter.numel() for parameter in self._of_shares]
            for parameter, summed in zip(self._of_shares, torch.split(together, sizes), strict=True):
                _gradient(parameter).copy_(summed.view_as(parameter))
        for parameter, owners in self._shared:
            dist.all_reduce(_gradient(parameter), group=owners)

    def norm(self) -> float:
        """The 2-norm over all stages; what several ranks hold counts once. After `reduce`, and where data ranks share
        no optimizer state: then each has the sums of its share only."""
        assert not self._parallel.distributed_optimizer, "no rank has all sums"
        own = [_gradient(parameter) for parameter in self._trained if self._counts(parameter)]
        return float(get_grad_norm_fp32(own, grad_stats_parallel_group=self._mesh.groups.mp))

    def _counts(self, parameter: torch.nn.Parameter) -> bool:
        return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
            parameter, self._mesh.groups.tp
        )


def _open_group_of_owners(trains_copy: bool, mesh: Mesh) -> dist.ProcessGroup | None:
    """The stages that train a copy of a shared weight, if any do. Collective."""
    holds = torch.zeros(mesh.world_size, device=mesh.device.torch)
    holds[mesh.rank] = trains_copy
    by_stage = mesh.sum_over_ranks(holds).view(mesh.pipeline_size, -1).amax(1).tolist()
    owners = [number for number, has_it in enumerate(by_stage) if has_it]
    return mesh.group_over_stages(owners) if owners else None


def _sees_a_share(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether tensor-parallel ranks have a parameter in full, but each its share of what it is applied to: positions
    with sequence parallelism, and always heads."""
    return bool(getattr(parameter, "sequence_parallel", False)) or name.endswith(HEAD_NORMS)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient
