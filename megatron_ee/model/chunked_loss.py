"""An exit's projection, cross-entropy and accuracy, a few rows at a time, so that the logits of all rows never exist.

The gradients are computed along with the loss: the softmax of a chunk is at hand only then, and a training exit runs
its head's backward right after its loss anyway. (Liger Kernel, arXiv 2410.10989, does so for one rank.)

The plain version, and the specification, is `token_losses`, `plain_losses` and `likeliest_tokens` over whole logits.

Shapes: S positions, B sequences, N = S * B rows, R rows of a chunk, H hidden size, V this rank's share of the
vocabulary, K tensor-parallel ranks; ranks hold consecutive shares.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_ee.model.split_vocabulary import of_all_ranks
from megatron_ee.model.token_objective import CROSS_ENTROPY, Distillation, Teacher, TokenObjective

_SEGMENTS = 64


class ProjectedLoss(NamedTuple):
    """Sums over the rows whose mask is 1: fp32 scalars (fp64 where the features are)."""

    objective: torch.Tensor  # scale * loss; the only one with a gradient
    cross_entropy: torch.Tensor  # in nats, whatever the loss is
    correct: torch.Tensor  # rows whose likeliest token is the label
    likeliest_SB: torch.Tensor  # int64, of every row: no sum


def projected_loss(
    features_SBH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_SB: torch.Tensor,
    mask_SB: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    scale: float = 1.0,
    chunk_rows: int,
    objective: TokenObjective = CROSS_ENTROPY,
    teacher: Teacher | None = None,
) -> ProjectedLoss:
    """Project, and take cross-entropy and accuracy over the whole vocabulary. Collective over `group`.

    Where gradients are enabled they are computed here and now; `backward` only multiplies. It runs once: a second one,
    or a derivative of a derivative, is a RuntimeError.

    Args:
        features_SBH: normed, in the weight's dtype; under tensor parallelism already copied (or gathered) into the
            region, since their gradient here is this rank's summand. Logits have to be finite, masked rows' too.
        weight_VH: this rank's rows of the output projection.
        labels_SB: int64, over the whole vocabulary; where the mask is 0 they may be anything.
        mask_SB: 1 where the label counts, else 0.
        scale: factor of the objective. It enters gradients before they take the features' dtype, so that fp16 holds
            them.
        chunk_rows: rows whose logits live at a time, at least 1.
        objective: what the loss on a row is.
        teacher: the final exit, where the objective distils it.
    """
    assert chunk_rows >= 1 and features_SBH.dtype == weight_VH.dtype
    distillation = None
    if objective.distillation:
        assert teacher is not None
        distillation = Distillation(objective, teacher, group)
    labels_N1, mask_N1 = labels_SB.flatten()[:, None], mask_SB.flatten()[:, None]
    scaled_loss, losses_N1, likeliest_N1 = _ProjectedLoss.apply(  # type: ignore[no-untyped-call]
        features_SBH.flatten(0, 1),
        weight_VH,
        labels_N1,
        mask_N1,
        group,
        _Recipe(scale, chunk_rows, objective, distillation),
        torch.is_grad_enabled(),  # inside, it always reads as off
    )
    mask_N1 = mask_N1.to(losses_N1)
    correct = ((likeliest_N1 == labels_N1) * mask_N1).sum()
    return ProjectedLoss(scaled_loss, (losses_N1 * mask_N1).sum(), correct, likeliest_N1.view_as(labels_SB))


class _Recipe(NamedTuple):
    scale: float
    chunk_rows: int
    objective: TokenObjective
    distillation: Distillation | None


class _ProjectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N1: torch.Tensor,
        mask_N1: torch.Tensor,
        group: dist.ProcessGroup,
        recipe: _Recipe,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, ...]:
        wants_features, wants_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        dtype, chunk_rows = torch.promote_types(features_NH.dtype, torch.float32), recipe.chunk_rows
        logits_RV = features_NH.new_empty(min(chunk_rows, len(features_NH)), len(weight_VH))
        softmax_RV = logits_RV if logits_RV.dtype == dtype else torch.empty_like(logits_RV, dtype=dtype)
        dfeatures_NH = torch.empty_like(features_NH) if wants_features else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=dtype) if wants_weight else None
        factor_N1 = mask_N1.to(dtype) * recipe.scale
        losses_N1, objectives_N1 = torch.empty_like(factor_N1), torch.empty_like(factor_N1)
        likeliest_N1 = torch.empty_like(labels_N1)
        labels = _own_labels(labels_N1, len(weight_VH), group, dtype)
        for start in range(0, len(features_NH), chunk_rows):
            rows = slice(start, start + chunk_rows)
            x_RH, chunk_labels = features_NH[rows], _Labels(labels.place_N1[rows], labels.own_N1[rows])
            logits_RV, softmax_RV = logits_RV[: len(x_RH)], softmax_RV[: len(x_RH)]
            torch.mm(x_RH, weight_VH.t(), out=logits_RV)
            distilled = recipe.distillation.compare(logits_RV, rows) if recipe.distillation else None
            result = _losses(logits_RV, softmax_RV, chunk_labels, group)
            losses_N1[rows], likeliest_N1[rows] = result.losses_R1, result.likeliest_R1
            pulls = _pulls(recipe.objective, result, factor_N1[rows], distilled)
            objectives_N1[rows] = pulls.objective_R1
            if not (wants_features or wants_weight):
                continue
            dlogits_RV = _logit_gradient(softmax_RV, chunk_labels, result.share_R1, pulls, out_RV=logits_RV)
            if dfeatures_NH is not None:
                torch.mm(dlogits_RV, weight_VH, out=dfeatures_NH[rows])
            if dweight_VH is not None:
                _add_product(dweight_VH, dlogits_RV.t(), x_RH)
        ctx.save_for_backward(dfeatures_NH, None if dweight_VH is None else dweight_VH.to(weight_VH.dtype))
        ctx.mark_non_differentiable(losses_N1, likeliest_N1)
        return objectives_N1.sum(), losses_N1, likeliest_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        # in place: were it called twice, autograd would see that what it saved has changed
        gradients = [None if saved is None else saved.mul_(incoming) for saved in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None)


class _Labels(NamedTuple):
    """The label's place in this rank's share; where it lies in another's, `own` is 0 and the place means nothing."""

    place_N1: torch.Tensor
    own_N1: torch.Tensor


def _own_labels(labels_N1: torch.Tensor, share_size: int, group: dist.ProcessGroup, dtype: torch.dtype) -> _Labels:
    place_N1 = labels_N1 - group.rank() * share_size
    own_N1 = (place_N1 >= 0) & (place_N1 < share_size)
    return _Labels(place_N1.where(own_N1, 0), own_N1.to(dtype))


class _Losses(NamedTuple):
    """Of a chunk: cross-entropy; the likeliest token; the probability of this rank's share, and the highest one."""

    losses_R1: torch.Tensor
    likeliest_R1: torch.Tensor
    share_R1: torch.Tensor
    log_highest_R1: torch.Tensor


def _losses(logits_RV: torch.Tensor, softmax_RV: torch.Tensor, labels: _Labels, group: dist.ProcessGroup) -> _Losses:
    """One exchange between ranks is enough, since each starts from the softmax over its share alone.

    Args:
        softmax_RV: is filled with the softmax over this rank's share; it may be the logits' own memory.
    """
    likeliest_R1 = _likeliest(logits_RV)
    target_R1 = logits_RV.gather(1, labels.place_N1) * labels.own_N1
    highest_R1 = logits_RV.gather(1, likeliest_R1).to(softmax_RV)
    torch.softmax(logits_RV, dim=1, dtype=softmax_RV.dtype, out=softmax_RV)
    log_sum_R1 = -softmax_RV.gather(1, likeliest_R1).log()  # of exp(logit - highest): the highest is at least 1 / V
    token_R1 = (likeliest_R1 + group.rank() * logits_RV.shape[1]).to(softmax_RV)  # exact up to 2^24 in fp32
    highest_KR1, log_sum_KR1, target_KR1, token_KR1 = of_all_ranks(
        torch.stack([highest_R1, log_sum_R1, target_R1, token_R1]), group
    ).unbind(1)
    best_1R1, rank_1R1 = highest_KR1.max(0, keepdim=True)  # the first rank of equals
    log_total_R1 = (highest_KR1 - best_1R1 + log_sum_KR1).logsumexp(0)
    losses_R1 = best_1R1[0] - target_KR1.sum(0) + log_total_R1
    share_R1 = (highest_R1 - best_1R1[0] + log_sum_R1 - log_total_R1).exp()
    return _Losses(losses_R1, token_KR1.gather(0, rank_1R1)[0].long(), share_R1, -log_total_R1)


def _likeliest(logits_RV: torch.Tensor) -> torch.Tensor:
    """The argmax over this rank's share: int64 [R, 1], the first of equals.

    On a CPU `max` looks at one value at a time and `amax` at many, so `max` sees only the segment with the highest.
    """
    segments_RMW = logits_RV.view(len(logits_RV), math.gcd(logits_RV.shape[1], _SEGMENTS), -1)
    segment_R1 = segments_RMW.amax(2).max(1, keepdim=True).indices
    width = segments_RMW.shape[2]
    best_R1W = segments_RMW.gather(1, segment_R1[:, :, None].expand(-1, -1, width))
    return best_R1W.max(2).indices + segment_R1 * width


class _Pulls(NamedTuple):
    """The scaled loss of a chunk's rows, and its gradient with respect to the logits: `factor` times that of
    cross-entropy, and where there is a teacher the product of `distilled` (its factor [R, 1] and gradient [R, V])."""

    objective_R1: torch.Tensor
    factor_R1: torch.Tensor
    distilled: tuple[torch.Tensor, torch.Tensor] | None = None


def _pulls(
    objective: TokenObjective,
    losses: _Losses,
    factor_R1: torch.Tensor,
    distilled: tuple[torch.Tensor, torch.Tensor] | None,
) -> _Pulls:
    """
    Args:
        factor_R1: of the whole loss on each row, before token weights.
    """
    if objective.weighs_tokens:
        factor_R1 = factor_R1 * losses.log_highest_R1.exp()
    if distilled is None:
        return _Pulls(losses.losses_R1 * factor_R1, factor_R1)
    divergence_R1, gradient_RV = distilled
    own_R1, distilled_R1 = (1 - objective.distillation) * factor_R1, objective.distillation * factor_R1
    return _Pulls(losses.losses_R1 * own_R1 + divergence_R1 * distilled_R1, own_R1, (distilled_R1, gradient_RV))


def _logit_gradient(
    softmax_RV: torch.Tensor, labels: _Labels, share_R1: torch.Tensor, pulls: _Pulls, *, out_RV: torch.Tensor
) -> torch.Tensor:
    """factor * (probability - [is the label]), and what distillation adds, computed in the softmax's dtype and written
    in that of `out_RV`."""
    at_label_R1 = (softmax_RV.gather(1, labels.place_N1) * share_R1 - labels.own_N1) * pulls.factor_R1
    if pulls.distilled is None:
        torch.mul(softmax_RV, share_R1 * pulls.factor_R1, out=out_RV)
        return out_RV.scatter_(1, labels.place_N1, at_label_R1.to(out_RV))
    softmax_RV.mul_(share_R1 * pulls.factor_R1).scatter_(1, labels.place_N1, at_label_R1)
    softmax_RV.addcmul_(*pulls.distilled)
    return out_RV.copy_(softmax_RV)


def _add_product(sum_VH: torch.Tensor, a_VR: torch.Tensor, b_RH: torch.Tensor) -> None:
    """sum += a @ b. Matrices of half precision are multiplied as such and summed in the sum's fp32."""
    if sum_VH.dtype == b_RH.dtype:
        sum_VH.addmm_(a_VR, b_RH)
    else:
        sum_VH.add_(a_VR @ b_RH)
