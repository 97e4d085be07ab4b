"""What F, X and B do on one stage during one step.

A stage receives g = dL/dy for its output y. With the losses L_s of its own exits, the gradient of `L_s + <g, y>`, g
held constant, with respect to the stage's weights and input is that of the whole loss (EE-LLM, arXiv 2312.04916,
section 3.1): no message between stages grows. Here the exits' share is split off: X leaves d_e = dL_s/dh_e at each
exit's hidden state h_e, never logits, and B starts from g at y and from d_e at every h_e.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_ee.data.batch import Batch
from megatron_ee.model.stage import Stage, Tap
from megatron_ee.parallel.pipeline.plan import Action
from megatron_ee.training.losses import ExitLoss, exit_loss


@dataclass(slots=True)
class _LiveMicrobatch:
    """A micro-batch between its F and its B."""

    x_SBH: torch.Tensor
    y_SBH: torch.Tensor
    taps: dict[Tap, torch.Tensor]
    tap_gradients: dict[Tap, torch.Tensor] = field(default_factory=dict)


class StageStep:
    """The program that the pipeline runtime runs for one batch.

    Args:
        loss_scales: exit layer -> factor of its summed cross-entropy in the loss: its weight over the global batch's
            number of unmasked tokens. None: losses are only measured (validation); the plan has no B then.
    """

    def __init__(self, stage: Stage, batch: Batch, loss_scales: Mapping[int, float] | None) -> None:
        self._stage, self._batch, self._loss_scales = stage, batch, loss_scales
        self._live: dict[tuple[int, int], _LiveMicrobatch] = {}  # by chunk and micro-batch
        self.losses: dict[int, ExitLoss] = {}
        self._positions = torch.arange(batch.tokens_MBS.shape[2], device=batch.tokens_MBS.device)

    def forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        """F: keep the output and the hidden state at each exit."""
        with torch.set_grad_enabled(self._loss_scales is not None):
            if received is None:
                x_SBH = self._stage.embed(self._batch.tokens_MBS[action.microbatch])
            else:
                x_SBH = received.requires_grad_(self._loss_scales is not None)
            chunk = self._stage.chunks[action.chunk]
            y_SBH, taps = self._stage.run_layers(x_SBH, self._positions, chunk.start, chunk.stop)
        self._live[action.chunk, action.microbatch] = _LiveMicrobatch(x_SBH, y_SBH, taps)
        return y_SBH

    def exits(self, action: Action) -> None:
        """X: each exit's loss and the backward of its head only; one exit's logits live at a time."""
        live = self._live[action.chunk, action.microbatch]
        for tap, hidden_SBH in live.taps.items():
            if self._loss_scales is None:
                with torch.no_grad():
                    loss = self._exit_loss(hidden_SBH, tap.layer, action.microbatch)
            else:
                leaf_SBH = hidden_SBH.detach().requires_grad_()
                loss = self._exit_loss(leaf_SBH, tap.layer, action.microbatch)
                torch.autograd.backward(loss.cross_entropy * self._loss_scales[tap.layer])
                assert leaf_SBH.grad is not None
                live.tap_gradients[tap] = leaf_SBH.grad
            self._add(tap.layer, loss)
        if self._loss_scales is None:
            del self._live[action.chunk, action.microbatch]

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """B: the layers' backward from the output's gradient and the exits' hidden-state gradients at once."""
        live = self._live.pop((action.chunk, action.microbatch))
        roots = [live.taps[tap] for tap in live.tap_gradients]
        gradients = list(live.tap_gradients.values())
        if gradient is not None:
            roots.append(live.y_SBH)
            gradients.append(gradient)
        torch.autograd.backward(roots, gradients)
        return live.x_SBH.grad if live.x_SBH.is_leaf else None

    def _exit_loss(self, hidden_SBH: torch.Tensor, layer: int, microbatch: int) -> ExitLoss:
        return exit_loss(
            self._stage.exit_logits(hidden_SBH, layer),
            self._batch.labels_MBS[microbatch],
            self._batch.mask_MBS[microbatch],
            self._stage.tp_group,
        )

    def _add(self, layer: int, loss: ExitLoss) -> None:
        detached = ExitLoss(*(value.detach() for value in loss))
        so_far = self.losses.get(layer)
        self.losses[layer] = ExitLoss(*map(torch.add, so_far, detached)) if so_far else detached
