"""What an early exit's loss on a token is made of, beside cross-entropy.

With the exit's probabilities p over the whole vocabulary, the final exit's q, and both at the distillation's
temperature T as p_T and q_T, the loss on a token is

    w * ((1 - a) * CE(p, label) + a * T^2 * KL(q_T || p_T))

a is the distillation's weight (Hinton et al., arXiv 1503.02531; T^2 makes up for the gradient's 1 / T^2), and the final
exit is held constant. w is 1, or the exit's own highest probability max(p) there, held constant too (EE-Tuning, arXiv
2402.00518): an exit learns more from tokens of which it is sure, which are those that it will be asked to decide.

The sum over tokens is divided by the number of unmasked tokens, weighted or not. Dividing by the sum of the weights
would give a micro-batch of which an exit is unsure the weight of one of which it is sure, which is what token weights
are against; and it would need one more sum over ranks before the backward of any exit.

`plain_losses` is the specification; `Distillation` is what `chunked_loss` has of it.

Shapes: S positions, B sequences, R rows of a chunk, N all rows, H hidden size, V this rank's share of the vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ee.model.split_vocabulary import log_probabilities, of_all_ranks, sum_over_vocabulary, token_losses


@dataclass(frozen=True, slots=True)
class TokenObjective:
    """
    Attributes:
        weighs_tokens: w is the highest probability, else 1.
        distillation: a, in [0, 1].
        temperature: T.
    """

    weighs_tokens: bool = False
    distillation: float = 0.0
    temperature: float = 1.0


CROSS_ENTROPY = TokenObjective()


class Teacher(NamedTuple):
    """The final exit, as `Stage.projection_input` gives it, without gradient."""

    features_SBH: torch.Tensor
    weight_VH: torch.Tensor


def plain_losses(
    logits_SBV: torch.Tensor,
    labels_SB: torch.Tensor,
    objective: TokenObjective,
    teacher: Teacher | None,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """The loss on each token, fp32 [S, B], from whole logits. Collective over `group`."""
    logits_SBV = logits_SBV.float()
    losses_SB = token_losses(logits_SBV.clone(), labels_SB, group)  # which may overwrite what it is given
    if objective.distillation:
        assert teacher is not None
        weight, temperature = objective.distillation, objective.temperature
        with torch.no_grad():
            teacher_SBV = (teacher.features_SBH @ teacher.weight_VH.T).float()
            wanted_SBV = log_probabilities(teacher_SBV / temperature, group)
        log_SBV = log_probabilities(logits_SBV / temperature, group)
        divergence_SB = sum_over_vocabulary(wanted_SBV.exp() * (wanted_SBV - log_SBV), group)
        losses_SB = (1 - weight) * losses_SB + weight * temperature**2 * divergence_SB
    if objective.weighs_tokens:
        losses_SB = losses_SB * _highest_probability(logits_SBV.detach(), group)
    return losses_SB


class Distillation:
    """The final exit's logits, a chunk at a time, and how far an exit's are from them."""

    def __init__(self, objective: TokenObjective, teacher: Teacher, group: dist.ProcessGroup) -> None:
        self._temperature, self._group = objective.temperature, group
        self._features_NH, self._weight_VH = teacher.features_SBH.detach().flatten(0, 1), teacher.weight_VH.detach()

    def compare(self, logits_RV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """T^2 KL(q_T || p_T) of these rows, [R, 1], and its gradient with respect to the exit's logits, [R, V].

        In fp32, or in fp64 where the logits are. One exchange between ranks is enough, since each starts from its
        share's own distributions. Collective.
        """
        temperature = self._temperature
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        student_RV = logits_RV.to(dtype) / temperature
        teacher_RV = (self._features_NH[rows] @ self._weight_VH.t()).to(dtype).div_(temperature)
        student_R1, teacher_R1 = (part.logsumexp(1, keepdim=True) for part in (student_RV, teacher_RV))
        gap_RV = teacher_RV - student_RV
        wanted_RV = teacher_RV.sub_(teacher_R1).exp_()  # of this rank's share alone
        gap_R1 = gap_RV.mul_(wanted_RV).sum(1, keepdim=True)
        figures = of_all_ranks(torch.stack([student_R1, teacher_R1, gap_R1]), self._group)
        student_KR1, teacher_KR1, gap_KR1 = figures.unbind(1)
        student_total_R1, teacher_total_R1 = student_KR1.logsumexp(0), teacher_KR1.logsumexp(0)
        gap_R1 = ((teacher_KR1 - teacher_total_R1).exp() * gap_KR1).sum(0)
        divergence_R1 = gap_R1 - teacher_total_R1 + student_total_R1
        wanted_RV.mul_((teacher_R1 - teacher_total_R1).exp_())
        gradient_RV = student_RV.sub_(student_total_R1).exp_().sub_(wanted_RV).mul_(temperature)
        return temperature**2 * divergence_R1, gradient_RV


def _highest_probability(logits_SBV: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[S, B], over the whole vocabulary."""
    highest_SB = log_probabilities(logits_SBV, group).amax(-1)
    if group.size() > 1:
        dist.all_reduce(highest_SB, op=dist.ReduceOp.MAX, group=group)
    return highest_SB.exp()
