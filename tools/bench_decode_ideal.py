"""The least time that decoding can take, from how deep each token went and what launches cost; imports no torch.

It is the law of single-stream early exit, in seconds instead of layers and for any number of sequences:

    ideal speed-up = (L + eta) / (E[l] + eta E[exits tested] + phi)

with L layers, E[l] the mean depth, eta a head's cost over a layer's, and phi the cost of missing keys and values. It
counts layers and heads alone, and no bookkeeping.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ee.inference.scheduling.costs import Curve, Segment, cost_of

KvPolicy = Literal["recompute", "fill", "propagate"]
_NOTHING: Curve = ((1, 0.0),)


@dataclass(frozen=True, slots=True)
class LaunchCosts:
    """What has been measured.

    Attributes:
        segments: running rows through the layers between neighbouring exits.
        asks: exit layer -> its confidence.
        speaks: exit layer, or the number of layers -> a token of it, beyond what was computed for the confidence.
        stores: keys and values alone, of the segment's layers.
    """

    segments: Mapping[Segment, Curve]
    asks: Mapping[int, Curve]
    speaks: Mapping[int, Curve]
    stores: Mapping[Segment, Curve]

    @property
    def num_layers(self) -> int:
        return max(stop for _, stop in self.segments)

    @property
    def layer(self) -> float:
        """Seconds of one row in one layer, on the average."""
        return sum(cost_of(curve, 1) for curve in self.segments.values()) / self.num_layers

    @property
    def eta(self) -> float:
        """What it costs to ask an exit, over a layer; of one row, on the average over exits."""
        return sum(cost_of(curve, 1) for curve in self.asks.values()) / len(self.asks) / self.layer


@dataclass(frozen=True, slots=True)
class Need:
    """Seconds at least.

    Attributes:
        layers: of rows of new tokens.
        missing_kv: what rows that were left behind add.
    """

    layers: float
    heads: float
    missing_kv: float

    @property
    def total(self) -> float:
        return self.layers + self.heads + self.missing_kv


def need(depths: Sequence[Sequence[int]], prompts: Sequence[int], costs: LaunchCosts, kv_policy: KvPolicy) -> Need:
    """What sequences need that step together, each token as deep as it went, every exit on its way asked.

    An exact policy computes missing keys and values with the first later token that goes deeper, and not at all where
    none does: none needs less.

    Args:
        depths: of each sequence's new tokens; the first is said by the prompt's last position.
        prompts: positions of each sequence before its first new token. They go as deep as that one; where keys and
            values are propagated, all but the last have gone to full depth before.
    """
    replay = _Replay(depths, prompts, costs, propagates=kv_policy == "propagate")
    for step in range(max(map(len, depths))):
        replay.step(step)
    return Need(replay.layers, replay.heads, replay.missing_kv)


def full_need(counts: Sequence[int], prompts: Sequence[int], costs: LaunchCosts) -> Need:
    """The same of full depth, which asks no early exit.

    Args:
        counts: each sequence's number of new tokens.
    """
    depths = [[costs.num_layers] * count for count in counts]
    return need(depths, prompts, replace(costs, asks={}), "recompute")


class _Replay:
    def __init__(
        self, depths: Sequence[Sequence[int]], prompts: Sequence[int], costs: LaunchCosts, *, propagates: bool
    ) -> None:
        self._depths, self._prompts, self._costs, self._propagates = depths, prompts, costs, propagates
        self._waiting = [Counter[int]() for _ in prompts]  # of each sequence: depth -> positions
        self.layers = self.heads = self.missing_kv = 0.0
        if propagates:
            before = sum(prompts) - len(prompts)
            self._prompts = [1] * len(prompts)
            self.layers = sum(cost_of(curve, before) for curve in costs.segments.values())

    def step(self, step: int) -> None:
        """One token of every sequence that has so many."""
        new = {number: 1 if step else self._prompts[number] for number, of in enumerate(self._depths) if step < len(of)}
        for start, stop in sorted(self._costs.segments):
            new = {number: rows for number, rows in new.items() if self._depths[number][step] >= stop}
            self._run(new, start, stop)
            self.heads += cost_of(self._costs.asks.get(stop, _NOTHING), len(new))
            leaving = [number for number in new if self._depths[number][step] == stop]
            self.heads += cost_of(self._costs.speaks[stop], len(leaving))
            for number in leaving:
                if stop < self._costs.num_layers and step + 1 < len(self._depths[number]):
                    self._leave(number, new[number], stop)

    def _run(self, new: Mapping[int, int], start: int, stop: int) -> None:
        """Through a segment, with what waits where it begins."""
        curve, rows, joining = self._costs.segments[start, stop], sum(new.values()), 0
        for number in new:
            waiting = self._waiting[number].pop(start, 0)
            self._waiting[number][stop] += waiting
            joining += waiting
        alone = cost_of(curve, rows)
        self.layers += alone
        self.missing_kv += cost_of(curve, rows + joining) - alone

    def _leave(self, number: int, rows: int, layer: int) -> None:
        if not self._propagates:
            self._waiting[number][layer] += rows
            return
        above = [curve for (start, _), curve in self._costs.stores.items() if start >= layer]
        self.missing_kv += sum(cost_of(curve, rows) for curve in above)
