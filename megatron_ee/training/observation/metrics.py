"""Losses of every exit, summed wherever the exit is, and read on every rank."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.losses import ExitLoss


class ExitMeter:
    """Sums each exit's loss over micro-batches, steps, stages and data-parallel ranks.

    Args:
        exits: all that are trained, ascending.
        gated: those whose gates are measured.
    """

    def __init__(self, exits: Sequence[int], mesh: Mesh, *, gated: Collection[int] = ()) -> None:
        self.exits, self._mesh, self._gated = exits, mesh, gated
        self._sums = torch.zeros(len(exits), 5 if gated else 2, dtype=torch.float64)
        self._num_batches, self._tokens = 0, 0.0
        self._measured: dict[int, float] = {}  # of each exit that ran, the tokens of those batches

    def add(self, losses: Mapping[int, ExitLoss], num_tokens: float, measured: Collection[int] | None = None) -> None:
        """This rank's losses of one batch; `num_tokens` is the global batch's number of unmasked tokens.

        Args:
            measured: the exits that ran, on whatever rank; None: all.
        """
        for row, layer in enumerate(self.exits):
            if measured is None or layer in measured:
                self._measured[layer] = self._measured.get(layer, 0.0) + num_tokens
            if layer in losses and self._mesh.tensor_rank == 0:  # tensor-parallel ranks have the same losses
                of_exit = losses[layer]
                sums = [of_exit.cross_entropy, of_exit.correct]
                if layer in self._gated and of_exit.gate is not None:
                    sums += of_exit.gate
                self._sums[row, : len(sums)] += torch.stack(sums).to(self._sums)
        self._num_batches += 1
        self._tokens += num_tokens

    def state(self) -> dict[str, Any]:
        """What has been added since the last read, over all ranks: it can go on in any layout. Collective."""
        sums = self._mesh.sum_over_ranks(self._sums.to(self._mesh.device.torch, copy=True))
        return {
            "sums": sums.tolist(),
            "num_batches": self._num_batches,
            "tokens": self._tokens,
            "measured": dict(self._measured),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; the main rank has the sums now, and a later read finds them there."""
        if self._mesh.is_main:
            self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._num_batches, self._tokens = state["num_batches"], state["tokens"]
        self._measured = dict(state["measured"])

    def means(self) -> dict[int, float]:
        """The loss per token of each exit that ran, of what has been added since the last read. Collective."""
        return {layer: cross_entropy for layer, (cross_entropy, *_) in self._means().items()}

    def read(self, kind: str, weights: Mapping[int, float]) -> dict[str, float]:
        """Figures per exit and the weighted loss (gates' loss aside), as means per token since the last read; without a
        batch since then there are none. An exit has means of the batches in which it ran, and none if it never did.
        Collective.

        Args:
            weights: of this moment. The loss is the sum of the exits' means times these; if one that has a weight has
                no mean, there is none.
        """
        if not self._num_batches:
            return {f"{kind}/unmasked_tokens": 0.0}
        means = self._means()
        figures = {f"{kind}/unmasked_tokens": self._tokens}
        if weights.keys() <= means.keys():
            figures[f"{kind}/loss"] = sum(weight * means[layer][0] for layer, weight in weights.items())
        for layer in self.exits:
            figures[f"{kind}/exit_{layer}/weight"] = weights.get(layer, 0.0)
        for layer, (loss, accuracy, *of_gate) in means.items():
            figures[f"{kind}/exit_{layer}/loss"] = loss
            figures[f"{kind}/exit_{layer}/ppl"] = math.exp(min(loss, 700.0))
            figures[f"{kind}/exit_{layer}/accuracy"] = accuracy
            if layer in self._gated:
                names = [f"{kind}/exit_{layer}/gate_{name}" for name in ("loss", "accuracy", "mean")]
                figures.update(zip(names, of_gate, strict=True))
        self._sums.zero_()
        self._num_batches, self._tokens = 0, 0.0
        self._measured = {}
        return figures

    def _means(self) -> dict[int, list[float]]:
        """Loss and accuracy of each exit that ran, and where there are gates, theirs: loss, accuracy, confidence."""
        sums = self._mesh.sum_over_ranks(self._sums.to(self._mesh.device.torch, copy=True)).tolist()
        tokens = {layer: max(1.0, count) for layer, count in self._measured.items()}  # batches may be masked altogether
        return {
            layer: [value / tokens[layer] for value in of_exit]
            for layer, of_exit in zip(self.exits, sums, strict=True)
            if layer in tokens
        }
