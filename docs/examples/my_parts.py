"""Parts of one's own, in one file outside the package. A config takes them by name:

plugins: [docs/examples/my_parts.py]
parallel: {schedule: one-at-a-time}
optimizer: {backend: sgd, lr_decay: inverse-sqrt}
inference: {exit: {measure: gini}}
"""

import math

import torch

from megatron_ee.config import OptimizerConfig
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.parallel.pipeline.schedules import Pipeline
from megatron_ee.training.gradients import StageGradients


def gini(logits_NV: torch.Tensor) -> torch.Tensor:
    """Confidence of an exit, row by row: how likely two draws agree, which is 1 less the Gini impurity."""
    return logits_NV.float().softmax(-1).square().sum(-1)


def one_at_a_time(pipeline: Pipeline, stage: int) -> list[Action]:
    """A micro-batch goes forward and back before the next one starts: the least memory, and the largest bubble."""
    return [
        Action(kind, stage, chunk=0, microbatch=microbatch)
        for microbatch in range(pipeline.num_microbatches)
        for kind in (Kind.F, Kind.B)
    ]


def inverse_sqrt(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The decay of "Attention is all you need", arXiv 1706.03762."""
    warmup = max(1, config.lr_warmup_iters)
    return (warmup / (warmup + step)) ** 0.5


class Sgd:
    """Plain gradient descent with clipping; it has no state to save."""

    def __init__(self, stage: Stage, config: OptimizerConfig, mesh: Mesh, gradients: StageGradients) -> None:
        self._parameters, self._gradients = list(stage.parameters()), gradients
        self._clip = config.clip_grad_norm or float("inf")

    @property
    def loss_scale(self) -> float:
        return 1.0  # fp32 and bf16 need none

    @torch.no_grad()
    def step(self, learning_rate: float) -> float | None:
        norm = self._gradients.norm()
        if not math.isfinite(norm):
            return None  # nothing is updated, and the trainer counts it
        scale = min(1.0, self._clip / (norm + 1e-6))
        for parameter in self._parameters:
            parameter.sub_(learning_rate * scale * parameter.main_grad)
        return norm

    def sharded_state_dict(self, model_state: dict, *, is_loading: bool = False) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


EXIT_MEASURES = {"gini": gini}
PIPELINE_SCHEDULES = {"one-at-a-time": one_at_a_time}
OPTIMIZER_BACKENDS = {"sgd": Sgd}
LEARNING_RATE_DECAYS = {"inverse-sqrt": inverse_sqrt}
