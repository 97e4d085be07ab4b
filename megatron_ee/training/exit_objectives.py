"""What the exits of a stage are trained on in one step: the loss on tokens as the config has it, and gates.

Some exits learn from the final one, by distillation or by their gate's target. Then the final exit has to be in the
same chunk, and to run first: `FinalExit` is what it leaves for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_ee.config import Config, ExitsConfig
from megatron_ee.config.checks_exits import apart_from_final, learners_from_final
from megatron_ee.errors import FieldError
from megatron_ee.model.stage import Stage
from megatron_ee.model.token_objective import CROSS_ENTROPY, Teacher, TokenObjective
from megatron_ee.parallel.chunks import Layout
from megatron_ee.training.gate_loss import GateSums, gate_loss
from megatron_ee.training.losses import ExitLoss, exit_loss


def check_learners(config: Config, layout: Layout) -> None:
    """
    Raises:
        FieldError: an exit learns from the final one, which is in another chunk.
    """
    places = {
        layer: (stage, number)
        for stage, chunks in enumerate(layout)
        for number, chunk in enumerate(chunks)
        for layer in chunk.exits
    }
    num_layers = config.model.num_layers
    for field, layers in learners_from_final(config.exits).items():
        for layer in layers:
            if places[layer] != (final := places[num_layers]):
                message = apart_from_final(layer, places[layer], final, num_chunks=config.parallel.chunks)
                raise FieldError(field, message)


@dataclass(slots=True)
class FinalExit:
    """The final exit of one micro-batch, for the other exits of its chunk.

    Attributes:
        hidden_SBH: at its tap, detached.
        likeliest_SB: its likeliest tokens, once it has run.
    """

    hidden_SBH: torch.Tensor
    likeliest_SB: torch.Tensor | None = None
    _teacher: Teacher | None = None

    @torch.no_grad()
    def teacher(self, stage: Stage, samples: "Samples") -> Teacher:
        """What `Stage.projection_input` gives for it; computed once, and where it is asked for."""
        if self._teacher is None:
            layer = stage.model.num_layers
            features_SBH = samples.features(stage, layer, self.hidden_SBH)
            self._teacher = Teacher(*stage.projection_input(features_SBH, layer))
        return self._teacher


class Samples(NamedTuple):
    """A micro-batch, as exits see it.

    Attributes:
        positions, documents_BS: see `Stage.run_layers`.
        divisor: of sums over its tokens; see `StepTokens.loss_divisor`.
        final: of the same chunk, if the final exit is there.
    """

    positions: torch.Tensor
    documents_BS: torch.Tensor | None
    labels_BS: torch.Tensor
    mask_BS: torch.Tensor
    divisor: float
    final: FinalExit | None

    def features(self, stage: Stage, layer: int, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """See `Stage.exit_features`."""
        return stage.exit_features(hidden_SBH, layer, self.positions, documents_BS=self.documents_BS)


class ExitObjectives:
    """
    Args:
        weights: exit layer -> weight of its loss, times the optimizer's loss scale. None: losses are only measured, and
            are cross-entropy alone.
        loss_scale: the optimizer's, for gates.
    """

    def __init__(
        self, stage: Stage, exits: ExitsConfig, weights: Mapping[int, float] | None, *, loss_scale: float
    ) -> None:
        self._stage, self._exits, self._weights, self._loss_scale = stage, exits, weights, loss_scale
        self._of_tokens = CROSS_ENTROPY
        if weights is not None:
            distillation = exits.distillation
            self._of_tokens = TokenObjective(
                weighs_tokens=exits.token_weights == "max_probability",
                distillation=distillation.weight if distillation else 0.0,
                temperature=distillation.temperature if distillation else 1.0,
            )

    def take(self, layer: int, hidden_SBH: torch.Tensor, samples: Samples) -> tuple[torch.Tensor, ExitLoss]:
        """The differentiable objective of an exit with its gate, and what is measured of both.

        Args:
            hidden_SBH: at the exit's tap.
        """
        stage, final = self._stage, samples.final
        is_final = layer == stage.model.num_layers
        objective = CROSS_ENTROPY if is_final else self._of_tokens
        loss = exit_loss(
            stage,
            samples.features(stage, layer, hidden_SBH),
            layer,
            samples.labels_BS,
            samples.mask_BS,
            scale=(self._weights[layer] if self._weights is not None else 0.0) / samples.divisor,
            chunk_rows=self._exits.loss_chunk_rows,
            objective=objective,
            teacher=final.teacher(stage, samples) if objective.distillation and final else None,
        )
        if is_final and final is not None:
            final.likeliest_SB = loss.likeliest_SB
        if stage.head(layer).gate is None:
            return loss.objective, ExitLoss(loss.cross_entropy, loss.correct)
        gate = self._gate(layer, hidden_SBH, loss.likeliest_SB, samples)
        scale = self._exits.gate_loss.weight * self._loss_scale / samples.divisor
        sums = GateSums(*(value.detach() for value in gate))
        return loss.objective + scale * gate.loss, ExitLoss(loss.cross_entropy, loss.correct, sums)

    def _gate(self, layer: int, hidden_SBH: torch.Tensor, likeliest_SB: torch.Tensor, samples: Samples) -> GateSums:
        target_SB = samples.labels_BS.T
        if self._exits.gate_loss.target == "final":
            assert samples.final is not None and samples.final.likeliest_SB is not None, "the final exit runs first"
            target_SB = samples.final.likeliest_SB
        return gate_loss(
            self._stage.gate_logits(hidden_SBH, layer),
            likeliest_SB == target_SB,
            samples.mask_BS.T,
            false_exit_cost=self._exits.gate_loss.false_exit_cost,
        )
