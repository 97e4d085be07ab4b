"""One sequence on the whole model: runs tokens as deep as they need to go, and keeps their keys and values exact."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.missing_kv import PendingPositions, Rows
from megatron_ee.inference.policies import Measure, fires
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
        measure: confidence in [0, 1] from an exit's logits; or GATE: exits that do not fire project nothing then.
        max_pending: more positions with missing KV than this trigger a pass that catches up; it changes no decision.
        capacity: longest sequence.
    """

    def __init__(
        self,
        stage: Stage,
        thresholds: dict[int, float],
        measure: Measure | None,
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
            asked = self._run_segment(start, stop)
            assert asked is not None, "the last position is on its way"
            if stop == self._num_layers:
                return Outcome(asked.logits(), stop, 1.0)
            confidence = asked.confidence(self._measure)
            if fires(confidence, self._thresholds[stop]):
                if len(self._pending) > self._max_pending:
                    self.flush()
                return Outcome(asked.logits(), stop, confidence)
        raise AssertionError("the last segment ends at the last layer")

    @torch.no_grad()
    def flush(self) -> None:
        """Take all pending positions to full depth, so that no keys and values are missing."""
        for start, stop in self._segments:
            self._run_segment(start, stop)

    def _run_segment(self, start: int, stop: int) -> "_AskedExit | None":
        """Run whatever waits at `start`, if anything does; returns the exit after `stop` at its last position."""
        rows = self._pending.take(start)
        if rows is None:
            return None
        positions_S = torch.tensor(rows.positions, device=self._device)
        self.cache.begin_launch(positions_S)
        x_SBH, taps = self._stage.run_layers(rows.hidden_SBH, positions_S, start, stop, store=self.cache)
        if stop < self._num_layers:
            self._pending.add(stop, Rows(rows.positions, x_SBH))
        hidden_SBH, features_1BH = taps[self._stage.tap_of(stop)], None
        if self._stage.head(stop).attends:  # it needs the keys and values of all positions
            features_1BH = self._stage.exit_features(hidden_SBH, stop, positions_S, store=self.cache)[-1:]
        return _AskedExit(self._stage, stop, positions_S[-1:], hidden_SBH[-1:], features_1BH)


class _AskedExit:
    """An exit at one position. Its logits, a product with the vocabulary, are computed where they are asked for.

    Args:
        features_1BH: None: they are of this position alone, and are computed with the logits.
    """

    def __init__(
        self,
        stage: Stage,
        layer: int,
        position_1: torch.Tensor,
        hidden_1BH: torch.Tensor,
        features_1BH: torch.Tensor | None,
    ) -> None:
        self._stage, self._layer, self._position_1 = stage, layer, position_1
        self._hidden_1BH, self._features_1BH = hidden_1BH, features_1BH
        self._logits_V: torch.Tensor | None = None

    def logits(self) -> torch.Tensor:
        if self._logits_V is None:
            if self._features_1BH is None:
                self._features_1BH = self._stage.exit_features(self._hidden_1BH, self._layer, self._position_1)
            self._logits_V = self._stage.project(self._features_1BH, self._layer).flatten()
        return self._logits_V

    def confidence(self, measure: Measure | None) -> float:
        """By a measure of logits, or by the exit's gate."""
        if measure is None:  # which is GATE
            return float(self._stage.gate_logits(self._hidden_1BH, self._layer).sigmoid())
        return measure(self.logits())
