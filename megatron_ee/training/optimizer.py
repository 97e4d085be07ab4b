"""megatron-core's AdamW around one stage: gradient buffers, their sums over ranks, clipping, the step."""

import math

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

from megatron_ee.config import OptimizerConfig
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import StageLayout
from megatron_ee.parallel.mesh import Mesh


class StageOptimizer:
    """Gradients and parameters of one stage.

    Gradients are sums: every loss is divided by the global batch's token count before its backward. Collective: every
    rank builds it and calls its methods together.

    Args:
        layouts: all stages' layouts, to find which of them hold a copy of the shared output projection.
    """

    def __init__(self, stage: Stage, config: OptimizerConfig, mesh: Mesh, layouts: tuple[StageLayout, ...]) -> None:
        self._config = config
        self._ddp = DistributedDataParallel(
            stage.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False),
            stage,
            pg_collection=mesh.groups,
        )
        megatron_config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.epsilon,
            clip_grad=config.clip_grad_norm or math.inf,  # it measures the norm only where it may clip
        )
        self._optimizer = get_megatron_optimizer(
            megatron_config,
            [self._ddp],
            config_overrides=get_standard_config_overrides(megatron_config),  # no decay on norms
            use_gloo_process_groups=False,
            pg_collection=mesh.groups,
        )
        owners = [number for number, layout in enumerate(layouts) if layout.exits]
        self._projection: torch.nn.Parameter | None = stage.output.weight if stage.output is not None else None
        self._projection_owners = mesh.group_over_stages(owners)

    def zero_gradients(self) -> None:
        """Before a step's first backward."""
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def reduce_gradients(self) -> None:
        """Sum gradients over data-parallel ranks, then over the stages that hold a copy of the shared projection."""
        self._ddp.finish_grad_sync()
        if self._projection is not None:
            dist.all_reduce(self._projection.main_grad, group=self._projection_owners)  # type: ignore[attr-defined]

    def step(self, learning_rate: float) -> float:
        """Clip, and update the parameters; returns the norm of all stages' gradients before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
        _, gradient_norm, _ = self._optimizer.step()
        return float(gradient_norm)

    def sharded_state_dict(self, model_state: ShardedStateDict, *, is_loading: bool = False) -> ShardedStateDict:
        """The optimizer's part of a checkpoint, sharded as the parameters in `model_state` are."""
        return self._optimizer.sharded_state_dict(model_state, is_loading=is_loading)

    def load_state_dict(self, state: dict) -> None:
        self._optimizer.load_state_dict(state)
