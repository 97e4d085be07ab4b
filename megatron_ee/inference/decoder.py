"""One sequence on the whole model: runs tokens as deep as they need to go, and keeps their keys and values exact."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.missing_kv import PendingPositions, Rows
from megatron_ee.inference.policies import fires
from megatron_ee.model.stage import Stage


@dataclass(frozen=True, slots=True)
class Outcome:
    """Logits for the token after the last one fed, and where they come from."""

    logits_V: torch.Tensor
    exit_layer: int
    confidence: float


class Decoder:
    """Feeds tokens through the segments between exits.

    Args:
        stage: the whole model on one stage.
        thresholds: the exits that may fire, with the confidence that each needs.
        measure: confidence in [0, 1] from an exit's logits.
        max_pending: more positions with missing KV than this trigger a pass that catches up; it changes no decision.
        capacity: longest sequence.
    """

    def __init__(
        self,
        stage: Stage,
        thresholds: dict[int, float],
        measure: Callable[[torch.Tensor], float],
        *,
        max_pending: int,
        capacity: int,
    ) -> None:
        self._stage, self._thresholds, self._measure = stage, thresholds, measure
        self._max_pending = max_pending
        self._num_layers = stage.model.num_layers
        self._segments = list(pairwise([0, *sorted(thresholds), self._num_layers]))
        self._device = next(stage.parameters()).device
        self._length = 0
        self._pending = PendingPositions()
        self.cache = KeyValueCache(stage, capacity)

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> Outcome:
        """Append tokens; only the last one's exit is asked, the others go along as deep as it goes."""
        positions = list(range(self._length, self._length + len(tokens)))
        self._length += len(tokens)
        x_SBH = self._stage.embed(torch.tensor([tokens], device=self._device))
        self._pending.add(0, Rows(positions, x_SBH))
        for start, stop in self._segments:
            features_1BH = self._run_segment(start, stop)
            logits_V = self._stage.project(features_1BH, stop).flatten()
            if stop == self._num_layers:
                break
            confidence = self._measure(logits_V)
            if fires(confidence, self._thresholds[stop]):
                if len(self._pending) > self._max_pending:
                    self.flush()
                return Outcome(logits_V, stop, confidence)
        return Outcome(logits_V, self._num_layers, 1.0)

    @torch.no_grad()
    def flush(self) -> None:
        """Take all pending positions to full depth, so that no keys and values are missing."""
        for start, stop in self._segments:
            self._run_segment(start, stop)

    def _run_segment(self, start: int, stop: int) -> torch.Tensor:
        """Run whatever waits at `start`; returns the features of its last position at the exit after `stop`."""
        rows = self._pending.take(start)
        if rows is None:
            return torch.empty(0)
        positions_S = torch.tensor(rows.positions, device=self._device)
        self.cache.begin_launch(positions_S)
        x_SBH, taps = self._stage.run_layers(rows.hidden_SBH, positions_S, start, stop, store=self.cache)
        if stop < self._num_layers:
            self._pending.add(stop, Rows(rows.positions, x_SBH))
        hidden_SBH = taps[self._stage.tap_of(stop)]
        if not self._stage.head(stop).attends:  # one that does needs the keys and values of all positions
            hidden_SBH = hidden_SBH[-1:]
        return self._stage.exit_features(hidden_SBH, stop, positions_S, store=self.cache)[-1:]
