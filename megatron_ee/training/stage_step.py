"""What F, X, B and W do on one stage during one step.

A stage receives g = dL/dy for its output y. With the losses L_s of its own exits, the gradient of `L_s + <g, y>`, g
held constant, with respect to the stage's weights and input is that of the whole loss (EE-LLM, arXiv 2312.04916,
section 3.1): no message between stages grows. Here the exits' share is split off: X leaves d_e = dL_s/dh_e at each
exit's hidden state h_e, never logits, and B starts from g at y and from d_e at every h_e. Where a plan has W, B leaves
the gradients of the layers' matrices to it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron_ee.config import ExitsConfig
from megatron_ee.data.batch import Batch
from megatron_ee.model.deferred_weights import WeightProduct
from megatron_ee.model.layer_drop import KeptRows
from megatron_ee.model.stage import Stage, Tap
from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan
from megatron_ee.training.exit_objectives import ExitObjectives, FinalExit, Samples
from megatron_ee.training.losses import ExitLoss, StepTokens
from megatron_ee.training.overlap import Settle, Settling


@dataclass(slots=True)
class _LiveMicrobatch:
    """A micro-batch between its F and its B."""

    x_SBH: torch.Tensor
    y_SBH: torch.Tensor
    taps: dict[Tap, torch.Tensor]
    final: FinalExit | None
    tap_gradients: dict[Tap, torch.Tensor] = field(default_factory=dict)


class StageStep:
    """The program that a pipeline runtime runs for one batch.

    Args:
        plan: without any B, X is all that is left of the backward: only exits are trained.
        weights: exit layer -> weight of its loss, times the optimizer's loss scale; other exits do not run. None:
            losses are only measured (validation), of all exits; the plan has no B then.
        exits: what exits are trained on.
        loss_scale: the optimizer's, for gates.
        no_sync: a context in which gradients are not handed over for their sum over data ranks, because more is to
            come; all but the last backwards run in it.
        kept: of each micro-batch, the rows that run each layer; empty: all run all.
        settle: is told of parameters that get no more gradient in this step, as soon as that is known.
    """

    def __init__(
        self,
        stage: Stage,
        batch: Batch,
        plan: Plan,
        tokens: StepTokens,
        weights: Mapping[int, float] | None,
        *,
        exits: ExitsConfig,
        loss_scale: float = 1.0,
        no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
        kept: Sequence[KeptRows] = (),
        settle: Settle | None = None,
    ) -> None:
        self._stage, self._batch, self._plan = stage, batch, plan
        self._tokens, self._weights = tokens, weights
        self._objectives = ExitObjectives(stage, exits, weights, loss_scale=loss_scale)
        self._no_sync, self._kept = no_sync, kept
        self._settling = Settling(stage, plan, kept, settle) if settle is not None else None
        self._live: dict[tuple[int, int], _LiveMicrobatch] = {}  # by chunk and micro-batch
        self._products: dict[tuple[int, int], list[WeightProduct]] = {}  # that B left for W
        self._last: dict[tuple[int, Kind, int], Action] = {}  # action of a kind on a chunk of a stage
        if no_sync is not nullcontext:
            self._last = {
                (action.stage, action.kind, action.chunk): action for actions in plan.actions for action in actions
            }
        kinds = {action.kind for actions in plan.actions for action in actions}
        self._has_backward = Kind.B in kinds
        assert not self._has_backward or (Kind.W in kinds) == (stage.weight_products is not None), (
            "B leaves W its share"
        )
        self.losses: dict[int, ExitLoss] = {}  # by exit, over regular micro-batches

    def forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        """F: keep the output and the hidden state at each exit, where anything is to come of them."""
        is_trained = self._is_trained(action)
        with torch.set_grad_enabled(is_trained):
            if received is None:
                x_SBH = self._stage.embed(self._batch.tokens_MBS[action.microbatch])
            else:
                x_SBH = received.requires_grad_(is_trained)
            chunk = self._stage.chunks[action.chunk]
            positions, documents_BS = self._batch.places_of(action.microbatch)
            kept = self._kept[action.microbatch] if self._kept else None
            y_SBH, taps = self._stage.run_layers(
                x_SBH, positions, chunk.start, chunk.stop, documents_BS=documents_BS, kept=kept
            )
        if self._weights is not None:
            taps = {tap: hidden_SBH for tap, hidden_SBH in taps.items() if tap.layer in self._weights}
        if is_trained or (chunk.exits and not self._has_backward):
            at_final_SBH = taps.get(Tap(self._stage.model.num_layers))
            # detached: a hook in the same graph holds it, and would keep the graph for good
            final = FinalExit(at_final_SBH.detach()) if at_final_SBH is not None else None
            self._live[action.chunk, action.microbatch] = _LiveMicrobatch(x_SBH, y_SBH, taps, final)
        return y_SBH

    def exits(self, action: Action) -> None:
        """X: each exit's loss and the backward of its head only; one exit's logits live at a time. The deepest exit is
        first: others may learn from the final one."""
        live = self._live[action.chunk, action.microbatch]
        with self._sync_of(action):
            for tap, hidden_SBH in reversed(live.taps.items()):
                if self._weights is None:
                    with torch.no_grad():
                        self._exit_loss(hidden_SBH, tap, action, live.final)
                elif self._has_backward:
                    live.tap_gradients[tap] = self._exit_gradient(hidden_SBH, tap, action, live.final)
                else:
                    torch.autograd.backward(self._exit_loss(hidden_SBH, tap, action, live.final))
        if not self._has_backward:
            del self._live[action.chunk, action.microbatch]
        self._settle_after(action)

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """B: the layers' backward from the output's gradient and the exits' hidden-state gradients at once."""
        live = self._live.pop((action.chunk, action.microbatch))
        pairs = [(live.taps[tap], tap_gradient) for tap, tap_gradient in live.tap_gradients.items()]
        if gradient is not None:
            pairs.append((live.y_SBH, gradient))
        pairs = [pair for pair in pairs if pair[0].requires_grad]  # a stage may have nothing to train
        if self._settling is not None:
            self._settling.before(action)
        with self._sync_of(action):
            torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        if self._stage.weight_products is not None:
            self._products[action.chunk, action.microbatch] = self._stage.weight_products.take()
        self._settle_after(action)
        if not pairs and live.x_SBH.requires_grad:  # a fill that turns round where no exit has a loss this time
            return torch.zeros_like(live.x_SBH)
        return live.x_SBH.grad if live.x_SBH.is_leaf else None

    def weights(self, action: Action) -> None:
        """W: the gradients of the layers' matrices, from what B left."""
        with self._sync_of(action):
            for product in self._products.pop((action.chunk, action.microbatch)):
                product.add()
        self._settle_after(action)

    def forward_with_exits(self, action: Action, received: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """F for a runtime that knows no X: when a backward of the output reaches an exit's hidden state, it runs the
        exit and goes on with both gradients.

        Returns:
            The output, and the final exit's differentiable loss (zero elsewhere).
        """
        y_SBH = self.forward(action, received)
        live = self._live.pop((action.chunk, action.microbatch))
        loss = y_SBH.new_zeros(())
        for tap, hidden_SBH in live.taps.items():
            if tap.layer == self._stage.model.num_layers:
                loss = self._exit_loss(hidden_SBH, tap, action, live.final)
            else:
                run_exit = partial(self._add_exit_gradient, hidden_SBH.detach(), tap, action, live.final)
                hidden_SBH.register_hook(run_exit)  # type: ignore[no-untyped-call]
        return y_SBH, loss

    def _add_exit_gradient(
        self, hidden_SBH: torch.Tensor, tap: Tap, action: Action, final: FinalExit | None, gradient: torch.Tensor
    ) -> torch.Tensor:
        with torch.enable_grad():
            return gradient + self._exit_gradient(hidden_SBH, tap, action, final)

    def _exit_gradient(
        self, hidden_SBH: torch.Tensor, tap: Tap, action: Action, final: FinalExit | None
    ) -> torch.Tensor:
        """The backward of an exit's head; returns dL/dh."""
        leaf_SBH = hidden_SBH.detach().requires_grad_()
        torch.autograd.backward(self._exit_loss(leaf_SBH, tap, action, final))
        assert leaf_SBH.grad is not None
        return leaf_SBH.grad

    def _exit_loss(self, hidden_SBH: torch.Tensor, tap: Tap, action: Action, final: FinalExit | None) -> torch.Tensor:
        """The exit's objective; what was measured is kept."""
        fill = self._plan.fill_of(action.microbatch)
        positions, documents_BS = self._batch.places_of(action.microbatch)
        samples = Samples(
            positions,
            documents_BS,
            self._batch.labels_MBS[action.microbatch],
            self._batch.mask_MBS[action.microbatch],
            self._tokens.loss_divisor(fill),
            final,
        )
        objective, own = self._objectives.take(tap.layer, hidden_SBH, samples)
        if fill is None:
            so_far = self.losses.get(tap.layer)
            self.losses[tap.layer] = so_far.plus(own) if so_far else own
        return objective

    def _settle_after(self, action: Action) -> None:
        if self._settling is not None:
            self._settling.after(action)

    def _is_trained(self, action: Action) -> bool:
        """Whether a B of the same micro-batch comes on this stage."""
        fill = self._plan.fill_of(action.microbatch)
        return self._weights is not None and self._has_backward and (fill is None or fill.trains(action.stage))

    def _sync_of(self, action: Action) -> AbstractContextManager[None]:
        is_last = self._last.get((action.stage, action.kind, action.chunk)) == action
        return nullcontext() if is_last else self._no_sync()
