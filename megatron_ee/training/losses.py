"""The loss of an exit on one micro-batch, and what it is divided by.

Every loss is a sum over the unmasked tokens of the whole global batch divided by their number, so that the gradient
does not depend on how the batch is cut into micro-batches and ranks.

Micro-batches that fill the pipeline's bubbles are extra samples. With n unmasked tokens in the batch, n_e in the
warm-up fills that run exit e, and n'_s in the cool-down fills whose backward comes down to stage s: exit e divides its
sum over regular micro-batches and warm-up fills by n + n_e, that over cool-down fills by n, and stage s multiplies its
gradient by n / (n + n'_s). Then every pair of an exit and a stage has weight 1, as without fills: the expectation is
the same and the variance lower.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ee.data.batch import Batch
from megatron_ee.model.chunked_loss import ProjectedLoss, projected_loss
from megatron_ee.model.split_vocabulary import likeliest_tokens, token_losses
from megatron_ee.model.stage import Stage
from megatron_ee.model.token_objective import CROSS_ENTROPY, Teacher, TokenObjective, plain_losses
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.pipeline.plan import Fill, Plan
from megatron_ee.training.gate_loss import GateSums


class ExitLoss(NamedTuple):
    """Sums over the unmasked tokens of a micro-batch; whoever has the batch's token count divides. Cross-entropy is
    plain, whatever the exit is trained on."""

    cross_entropy: torch.Tensor
    correct: torch.Tensor
    gate: GateSums | None = None

    def plus(self, other: "ExitLoss") -> "ExitLoss":
        """The sum of both; the same exit's, so that both have a gate or none has."""
        gates = GateSums(*map(torch.add, self.gate, other.gate)) if self.gate and other.gate else None
        return ExitLoss(self.cross_entropy + other.cross_entropy, self.correct + other.correct, gates)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Unmasked tokens over all data-parallel ranks, as one stage counts them.

    Attributes:
        regular: of the global batch.
        warmup: of the warm-up fills that run this stage's exits.
        cooldown: of the cool-down fills whose backward comes down to this stage.
    """

    regular: float
    warmup: float = 0.0
    cooldown: float = 0.0

    def loss_divisor(self, fill: Fill | None) -> float:
        """What a summed loss of a micro-batch on this stage is divided by."""
        is_cooldown = fill is not None and fill.kind == "cooldown"
        return max(1.0, self.regular + (0.0 if is_cooldown else self.warmup))

    @property
    def gradient_factor(self) -> float:
        """What this stage's gradient, summed over all of its micro-batches, is multiplied by."""
        return self.regular / (self.regular + self.cooldown) if self.cooldown else 1.0


def count_tokens(batch: Batch, plan: Plan, mesh: Mesh) -> StepTokens:
    """Collective over data-parallel ranks."""
    counts_M = batch.mask_MBS.sum(dim=(1, 2), dtype=torch.float64)
    dist.all_reduce(counts_M, group=mesh.groups.dp)
    counts, stage = counts_M.tolist(), mesh.pipeline_rank
    of_fills = list(zip(plan.fills, counts[plan.num_regular :], strict=True))
    return StepTokens(
        regular=sum(counts[: plan.num_regular]),
        warmup=sum(count for fill, count in of_fills if fill.kind == "warmup" and fill.trains(stage)),
        cooldown=sum(count for fill, count in of_fills if fill.kind == "cooldown" and fill.trains(stage)),
    )


def exit_loss(
    stage: Stage,
    features_SBH: torch.Tensor,
    layer: int,
    labels_BS: torch.Tensor,
    mask_BS: torch.Tensor,
    *,
    scale: float,
    chunk_rows: int,
    objective: TokenObjective = CROSS_ENTROPY,
    teacher: Teacher | None = None,
) -> ProjectedLoss:
    """Cross-entropy (nats, fp32) and right top-1 predictions of an exit, summed over the tokens whose mask is 1, and
    what it is trained on.

    Args:
        scale: factor of the differentiable objective.
        chunk_rows: tokens whose logits exist at a time; 0: all at once, the plain version of the same.
        objective: what the loss on a token is.
        teacher: the final exit, where the objective distils it.
    """
    labels_SB, mask_SB = labels_BS.T, mask_BS.T
    if chunk_rows:
        inputs_SBH, weight_VH = stage.projection_input(features_SBH, layer)
        return projected_loss(
            inputs_SBH,
            weight_VH,
            labels_SB,
            mask_SB,
            stage.tp_group,
            scale=scale,
            chunk_rows=chunk_rows,
            objective=objective,
            teacher=teacher,
        )
    logits_SBV, group = stage.project(features_SBH, layer), stage.tp_group
    likeliest_SB = likeliest_tokens(logits_SBV, group)
    correct = ((likeliest_SB == labels_SB) * mask_SB).sum()
    if objective == CROSS_ENTROPY:
        cross_entropy = (token_losses(logits_SBV, labels_SB, group) * mask_SB).sum()
        return ProjectedLoss(cross_entropy * scale, cross_entropy.detach(), correct, likeliest_SB)
    loss = (plain_losses(logits_SBV, labels_SB, objective, teacher, group) * mask_SB).sum()
    cross_entropy = (token_losses(logits_SBV.detach().clone(), labels_SB, group) * mask_SB).sum()
    return ProjectedLoss(loss * scale, cross_entropy, correct, likeliest_SB)
