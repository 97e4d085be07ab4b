"""Sums over data ranks that begin while other gradients are computed, where not all parameters get one.

megatron-core counts the gradients of a bucket's parameters in the first step, and begins the bucket's sum as soon as
there are as many again. That holds only where each step gives gradients to the same parameters: one more and the sum
begins too early, one less and it never does. With layers that samples skip and exits that have no loss in an iteration
it doesn't hold, and what is left out differs between data ranks, which have to begin their sums in the same order.

Here the stage says which parameters are settled, that is get no more gradient in this step, and buckets begin in one
order, each when its parameters are settled and the one before has begun. What is left begins with `finish_grad_sync`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_ee.model.layer_drop import KeptRows
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan

Settle = Callable[[Iterable[torch.nn.Parameter]], None]


class OverlappingSums(DistributedDataParallel):
    """megatron-core's gradient buffers, whose buckets begin when their parameters are settled."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        module = self.module
        assert isinstance(module, Stage)
        # In a step's last backward each gets one gradient at most. Others may get several: they are settled by name.
        self._arriving = set(module.layers.parameters())
        # Copies of what stages share get gradients from all over the stage, so they come last.
        copies = set(module.shared_parameters.values())
        self._in_order = sorted(self.bucket_groups, key=lambda group: not copies.isdisjoint(group.params))
        self._unsettled: list[set[torch.nn.Parameter]] = []
        self._num_begun = 0

    def zero_grad_buffer(self) -> None:
        """Before a step's first backward."""
        for group in self.bucket_groups:
            group.per_param_grad_ready_counts = {}  # so that to megatron-core every step is the first: it begins none
        super().zero_grad_buffer()
        self._unsettled, self._num_begun = [set(group.params) for group in self._in_order], 0

    def settle(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """They get no more gradient in this step."""
        settled = set(parameters)
        for left in self._unsettled:
            left -= settled
        while self._num_begun < len(self._in_order) and not self._unsettled[self._num_begun]:
            self._in_order[self._num_begun].start_grad_sync()
            self._num_begun += 1

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        """megatron-core's name: what follows a gradient of `param`."""
        add: Callable[..., None] = super()._make_backward_post_hook(param)

        def hook(*unused: object) -> None:
            add(*unused)
            if param in self._arriving and self.param_to_bucket_group[param].is_last_microbatch:
                self.settle([param])

        return hook


class Settling:
    """Says of a stage's parameters that they are settled, as the actions go by that are the last of their kind.

    Args:
        kept: of each micro-batch, the rows that run each layer.
    """

    def __init__(self, stage: Stage, plan: Plan, kept: Sequence[KeptRows], settle: Settle) -> None:
        self._stage, self._kept, self._settle = stage, kept, settle
        self._closing = Kind.B if stage.weight_products is None else Kind.W
        self._last = {(action.stage, action.kind, action.chunk): action for steps in plan.actions for action in steps}
        self._last_exits = {action.stage: action for steps in plan.actions for action in steps if action.kind is Kind.X}

    def before(self, action: Action) -> None:
        """A layer that every sample skips gets nothing in the last backward, and has all from those before."""
        if action.kind is self._closing is Kind.B and self._is_last(action):
            rows = self._kept[action.microbatch] if self._kept else {}
            self._settle_layers(action, [layer for layer, kept in rows.items() if not len(kept)])

    def after(self, action: Action) -> None:
        """Exits are settled after all X of the stage, and layers after their last B or W."""
        if action == self._last_exits.get(action.stage):
            stage = self._stage
            modules = (stage.exits, stage.norm, stage.output)
            self._settle(parameter for module in modules if module is not None for parameter in module.parameters())
        if action.kind is self._closing and self._is_last(action):
            chunk = self._stage.chunks[action.chunk]
            self._settle_layers(action, range(chunk.start + 1, chunk.stop + 1))
            if chunk.has_embedding and self._stage.embedding is not None:
                self._settle(self._stage.embedding.parameters())

    def _is_last(self, action: Action) -> bool:
        return self._last[action.stage, action.kind, action.chunk] == action

    def _settle_layers(self, action: Action, layers: Iterable[int]) -> None:
        chunk = self._stage.chunks[action.chunk]
        own = (layer for layer in layers if chunk.start < layer <= chunk.stop)
        self._settle(parameter for layer in own for parameter in self._stage.layers[str(layer)].parameters())
