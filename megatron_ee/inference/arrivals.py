"""Rows on their way through layers, and what comes of them.

Shapes: N rows, H hidden size.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.launch import Launch
from megatron_ee.inference.row_places import SequenceRows
from megatron_ee.inference.runner import Runner


class Leg(NamedTuple):
    """Rows on their way through layers `start + 1` to `stop`."""

    rows: Sequence[SequenceRows]
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return sum(len(positions) for _, positions in self.rows)


class Features(NamedTuple):
    """What the block of an exit's head made of the rows of the sequences that ask it."""

    launch: Launch
    features_NH: torch.Tensor


class Arrival(NamedTuple):
    """Rows that have come to an exit, to where a stage ends, or to the end.

    Attributes:
        input_NH: at the exit before, or where a stage began after it; `previous` then has states of that exit, by slot.
    """

    runner: Runner
    layer: int
    launch: Launch
    input_NH: torch.Tensor
    output_NH: torch.Tensor
    hidden_NH: torch.Tensor
    features: Features | None
    previous: Mapping[int, torch.Tensor] = MappingProxyType({})

    def last_states(self, slots: Sequence[int]) -> torch.Tensor:
        """Of the newest row of each of these sequences, [N, H]."""
        (output_NH,) = _last(self.launch, dict.fromkeys(slots, 1), self.output_NH)
        return output_NH

    def states_before(self, slots: Collection[int]) -> Mapping[int, torch.Tensor]:
        """Of the newest row of each of these sequences, at the exit before this one: [H]."""
        (input_NH,) = _last(self.launch, dict.fromkeys(slots, 1), self.input_NH)
        return {slot: self.previous.get(slot, x_H) for slot, x_H in zip(slots, input_NH, strict=True)}

    def ask(self, slots: Sequence[int]) -> AskedExit:
        """The exit at the last position of each of these sequences."""
        return self.ask_last(dict.fromkeys(slots, 1))

    def ask_last(self, counts: Mapping[int, int]) -> AskedExit:
        """The exit at so many last positions of sequences, by slot, one after the other."""
        features_NH = None
        if self.runner.attends(self.layer):
            assert self.features is not None, "a sequence asks an exit that it has not named"
            (features_NH,) = _last(self.features.launch, counts, self.features.features_NH)
        hidden_NH, output_NH, previous_NH = _last(self.launch, counts, self.hidden_NH, self.output_NH, self.input_NH)
        if self.previous and len(counts) == len(previous_NH):
            previous_NH = torch.stack([*self.states_before(counts).values()])
        return AskedExit(
            self.runner,
            self.layer,
            hidden_NH=hidden_NH,
            output_NH=output_NH,
            previous_NH=previous_NH,
            features_NH=features_NH,
        )


def _last(launch: Launch, counts: Mapping[int, int], *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """So many last rows of sequences, by slot, of each tensor; no copy where they are all."""
    if list(counts.items()) == [(slot, len(positions)) for slot, positions in launch.rows]:
        return of
    rows_N = torch.tensor(launch.last_rows_of(counts), device=of[0].device)
    return tuple(x_NH[rows_N] for x_NH in of)
