"""Cuts a model into parts whose slowest is as fast as can be: where each part ends, and who has an exit on a border.

An exit after the last layer of one part may as well be computed on the input of the next (the same function), unless
its head reads the inside of its layer.

**One part a stage.** A dynamic programme over cuts and sides finds the least duration that the slowest part can have;
a second one finds, among the cuts that keep to it, the least sum of squared durations, so that the other parts are as
equal as can be. Both are exact, but for rounding: durations are whole units, some 1e-12 of the whole model's, and what
differs by no more than that of each layer and exit is equal. Of equals the earlier part gets more layers, and an exit
stays at the end of its part.

**Several parts a stage.** The slowest stage, all its parts together, matters most, then the slowest part. The best
cuts into parts and equal layers are both improved by moving single layers between parts, and exits across borders, for
as long as it helps; the better result is taken. It is not proven the best, but is never worse than equal layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

from megatron_ee.config import StagePlacement

_UNITS = 2**40  # of the whole model's duration


@dataclass(frozen=True, slots=True)
class Work:
    """Durations of a model's parts, in any unit: F + X + B in training.

    Attributes:
        layers: of each layer, the first one first.
        first, last: what the first part has beside its layers (the embedding), and the last (the final exit).
        exits: layer -> duration of the early exit after it.
        only_at_end: the exits that have to be with their layer.
    """

    layers: Sequence[float]
    first: float
    last: float
    exits: Mapping[int, float]
    only_at_end: frozenset[int] = frozenset()

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class _Border(NamedTuple):
    """Between two parts, after layer `layer`. `is_right`: the exit on it belongs to the second of them."""

    layer: int
    is_right: bool = False


def balance(work: Work, num_stages: int, chunks_per_stage: int = 1) -> tuple[StagePlacement, ...]:
    """The layers and exits of `num_stages * chunks_per_stage` parts, in the model's order; each has a layer at least.

    Part i is on stage i % num_stages.
    """
    num_parts = num_stages * chunks_per_stage
    assert num_parts <= work.num_layers, f"{num_parts} parts of {work.num_layers} layers"
    durations = _Durations(work)
    equal = _equal_layers(work.num_layers, num_parts)
    borders = _best_cuts(durations, num_parts, limit=max(durations.of_parts(equal)))
    if chunks_per_stage > 1:
        climbed = [_climb(durations, start, num_stages) for start in (borders, equal)]
        borders = min(climbed, key=lambda result: _rank(durations, result, num_stages))
    ends = [_Border(0), *borders, _Border(work.num_layers)]
    return tuple(
        StagePlacement(layers=stop.layer - start.layer, exits_at_start=start.is_right, exits_at_end=not stop.is_right)
        for start, stop in pairwise(ends)
    )


class _Durations:
    """Work in whole units."""

    def __init__(self, work: Work) -> None:
        total = sum(work.layers) + work.first + work.last + sum(work.exits.values())
        assert total > 0, "no part takes any time"

        def whole(duration: float) -> int:
            return round(duration / total * _UNITS)

        self.num_layers = work.num_layers
        self._layers_until = [0, *accumulate(map(whole, work.layers))]  # the sum of the first ones
        self._first, self._last = whole(work.first), whole(work.last)
        self._exits = [whole(work.exits.get(layer, 0.0)) for layer in range(work.num_layers + 1)]
        self._exits_until = list(accumulate(self._exits))  # the sum of those after layers 0 to index
        self.rounding = work.num_layers + len(work.exits) + 2  # by so much, sums that are equal may differ
        self._movable = work.exits.keys() - work.only_at_end

    def borders_at(self, layer: int) -> list[_Border]:
        """Who may own an exit there; the second one, if both may, before the first."""
        return [_Border(layer, is_right=True), _Border(layer)] if layer in self._movable else [_Border(layer)]

    def of_part(self, start: _Border, stop: _Border) -> int:
        exits = self._exits_until[stop.layer] - self._exits_until[start.layer]
        exits += self._exits[start.layer] * start.is_right - self._exits[stop.layer] * stop.is_right
        ends = self._first * (start.layer == 0) + self._last * (stop.layer == self.num_layers)
        return self._layers_until[stop.layer] - self._layers_until[start.layer] + exits + ends

    def of_parts(self, borders: Sequence[_Border]) -> list[int]:
        ends = [_Border(0), *borders, _Border(self.num_layers)]
        return [self.of_part(start, stop) for start, stop in pairwise(ends)]


def _equal_layers(num_layers: int, num_parts: int) -> list[_Border]:
    """As equal as can be; the first parts take what is left over, and exits stay at the ends."""
    layers, left_over = divmod(num_layers, num_parts)
    return [_Border(stop) for stop in accumulate(layers + (part < left_over) for part in range(num_parts - 1))]


def _best_cuts(durations: _Durations, num_parts: int, limit: int) -> list[_Border]:
    """Exact. `limit`: what the slowest part of some cut takes."""
    slowest = max(durations.of_parts(_cut(durations, num_parts, limit, max)))
    return _cut(durations, num_parts, slowest + durations.rounding, lambda duration, rest: duration**2 + rest)


def _cut(durations: _Durations, num_parts: int, limit: int, add: Callable[[int, int], int]) -> list[_Border]:
    """The borders with the least `add(part, add(next part, ...))` among those that keep every part to `limit`."""
    num_layers = durations.num_layers
    last = _Border(num_layers)
    rest: dict[_Border, int] = {last: 0}  # from each border on, the least for the parts that are left
    chosen: list[dict[_Border, _Border]] = []  # and the border where the first of them ends
    for later_parts in range(num_parts):
        least: dict[_Border, int] = {}
        choice: dict[_Border, _Border] = {}
        parts_until = num_parts - later_parts  # with this one
        last_stop = num_layers - later_parts
        first_stop = parts_until if later_parts else num_layers
        for layer in range(parts_until - 1, last_stop):
            for start in durations.borders_at(layer):
                stops = range(max(first_stop, layer + 1), last_stop + 1)
                for stop, duration in _parts_from(durations, start, stops, limit):
                    if stop in rest and (value := add(duration, rest[stop])) <= least.get(start, value):
                        least[start], choice[start] = value, stop
        rest = least
        chosen.append(choice)
    borders = [_Border(0)]
    for choice in reversed(chosen):
        borders.append(choice[borders[-1]])
    return borders[1:-1]


def _parts_from(durations: _Durations, start: _Border, stops: range, limit: int) -> Iterator[tuple[_Border, int]]:
    """Where a part that begins at `start` may end, and its duration; of equals the last is preferred."""
    for layer in stops:
        within = [
            (stop, duration)
            for stop in durations.borders_at(layer)
            if (duration := durations.of_part(start, stop)) <= limit
        ]
        if not within:  # nor will any longer part be
            return
        yield from within


def _rank(durations: _Durations, borders: Sequence[_Border], num_stages: int) -> tuple[int, ...]:
    """Smaller is better: the slowest stage, the slowest part, and how unequal the stages and the parts are."""
    parts = durations.of_parts(borders)
    stages = [sum(parts[stage::num_stages]) for stage in range(num_stages)]
    return max(stages), max(parts), sum(stage**2 for stage in stages), sum(part**2 for part in parts)


def _climb(durations: _Durations, borders: list[_Border], num_stages: int) -> list[_Border]:
    """Take the first neighbour that is better, until none is."""
    best = _rank(durations, borders, num_stages)
    improved = True
    while improved:
        improved = False
        for candidate in _neighbours(durations, borders, num_stages):
            if (value := _rank(durations, candidate, num_stages)) < best:
                borders, best, improved = candidate, value, True
                break
    return borders


def _neighbours(durations: _Durations, borders: Sequence[_Border], num_stages: int) -> Iterator[list[_Border]]:
    """One exit on the other side of its border; or one layer moved between two parts, which are neighbours or of which
    one is on the slowest stage, with the exits on the borders between them at either side."""
    for index, border in enumerate(borders):
        for other in durations.borders_at(border.layer):
            if other != border:
                yield [*borders[:index], other, *borders[index + 1 :]]
    parts = durations.of_parts(borders)
    stages = [sum(parts[stage::num_stages]) for stage in range(num_stages)]
    slowest = stages.index(max(stages))
    stops = [border.layer for border in borders]
    sizes = [stop - start for start, stop in pairwise([0, *stops, durations.num_layers])]
    for left, right in combinations(range(len(parts)), 2):
        if right - left == 1 or slowest in (left % num_stages, right % num_stages):
            for step, giver in ((1, right), (-1, left)):
                if sizes[giver] > 1:
                    moved = [durations.borders_at(stop + step) for stop in stops[left:right]]
                    for side in (-1, 0):  # at the ends; at the starts where they may
                        yield [*borders[:left], *(options[side] for options in moved), *borders[right:]]
