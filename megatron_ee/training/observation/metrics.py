"""Losses of every exit, summed wherever the exit is, and read on every rank."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.losses import ExitLoss


class ExitMeter:
    """Sums each exit's loss over micro-batches, steps, stages and data-parallel ranks.

    Args:
        exits: all that are trained, ascending.
    """

    def __init__(self, exits: Sequence[int], mesh: Mesh) -> None:
        self.exits, self._mesh = exits, mesh
        self._sums = torch.zeros(len(exits), 2, dtype=torch.float64)
        self._num_batches, self._tokens = 0, 0.0

    def add(self, losses: Mapping[int, ExitLoss], num_tokens: float) -> None:
        """This rank's losses of one batch; `num_tokens` is the global batch's number of unmasked tokens."""
        for row, layer in enumerate(self.exits):
            if layer in losses and self._mesh.tensor_rank == 0:  # tensor-parallel ranks have the same losses
                self._sums[row] += torch.stack(losses[layer]).to(self._sums)
        self._num_batches += 1
        self._tokens += num_tokens

    def state(self) -> dict[str, Any]:
        """What has been added since the last read, over all ranks: it can go on in any layout. Collective."""
        sums = self._mesh.sum_over_ranks(self._sums.to(self._mesh.device.torch, copy=True))
        return {"sums": sums.tolist(), "num_batches": self._num_batches, "tokens": self._tokens}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; the main rank has the sums now, and a later read finds them there."""
        if self._mesh.is_main:
            self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._num_batches, self._tokens = state["num_batches"], state["tokens"]

    def means(self) -> dict[int, float]:
        """Each exit's loss per token, of what has been added since the last read. Collective."""
        sums = self._mesh.sum_over_ranks(self._sums.to(self._mesh.device.torch, copy=True)).tolist()
        return {
            layer: cross_entropy / max(1.0, self._tokens)
            for layer, (cross_entropy, _) in zip(self.exits, sums, strict=True)
        }

    def read(self, kind: str, weights: Mapping[int, float]) -> dict[str, float]:
        """Figures per exit and the weighted loss, as means per token since the last read; without a batch since then
        there are none. Collective."""
        if not self._num_batches:
            return {f"{kind}/unmasked_tokens": 0.0}
        sums = self._mesh.sum_over_ranks(self._sums.to(self._mesh.device.torch, copy=True)).tolist()
        tokens = max(1.0, self._tokens)  # a batch may be masked altogether
        figures = {f"{kind}/loss": 0.0, f"{kind}/unmasked_tokens": self._tokens}
        for layer, (cross_entropy, correct) in zip(self.exits, sums, strict=True):
            loss = cross_entropy / tokens
            figures[f"{kind}/loss"] += weights[layer] * loss
            figures[f"{kind}/exit_{layer}/loss"] = loss
            figures[f"{kind}/exit_{layer}/ppl"] = math.exp(min(loss, 700.0))
            figures[f"{kind}/exit_{layer}/accuracy"] = correct / tokens
            figures[f"{kind}/exit_{layer}/weight"] = weights[layer]
        self._sums.zero_()
        self._num_batches, self._tokens = 0, 0.0
        return figures
