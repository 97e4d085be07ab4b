"""Takes rows of sequences from depth to depth, and keeps ledger, cache and waiting states in agreement.

Shapes: N rows, B sequences, H hidden size.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.blocks import BLOCK, Blocks
from megatron_ee.inference.cuda_graphs import SegmentGraphs, capture_on
from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.launch import Launch
from megatron_ee.inference.ledger import DepthLedger
from megatron_ee.inference.prefixes import Prefixes
from megatron_ee.inference.row_places import SequenceRows
from megatron_ee.inference.runner import Runner
from megatron_ee.inference.waiting_states import WaitingStates
from megatron_ee.inference.work import Work
from megatron_ee.model.rotary import Rotary, RotationTable


class DepthWalk:
    """
    Args:
        exits: of the model; positions may wait at them.
        slots: sequences at most.
        capacity: positions of a sequence at most.
        room: positions of a sequence that may be at one exit at a time.
        blocks: that keys and values have; None: enough for the longest sequences in all slots.
        keeps_prefixes: a sequence begins with the keys and values that are there of others that began so.
    """

    def __init__(
        self,
        runner: Runner,
        exits: Sequence[int],
        *,
        slots: int,
        capacity: int,
        room: int,
        blocks: Blocks | None = None,
        keeps_prefixes: bool = False,
    ) -> None:
        stage = runner.stage
        self._runner, self._num_layers = runner, stage.model.num_layers
        parameter = next(stage.parameters())
        self._exits = tuple(exits)
        self._blocks = [layer for layer in (*exits, self._num_layers) if runner.attends(layer)]
        self.ledger = DepthLedger((0, *exits, self._num_layers))
        capture = capture_on(parameter.device, stage.tp_group)
        self.blocks = blocks or Blocks(slots, slots * -(-capacity // BLOCK) * BLOCK)
        self.cache = KeyValueCache(stage, self.blocks)
        self.prefixes = Prefixes(self.blocks.size) if keeps_prefixes else None
        rotary = Rotary(stage.model, parameter.device)
        self._rotation = RotationTable(rotary, capacity, self.cache.group, parameter.dtype, parameter.device)
        self._states = WaitingStates(slots, min(room, capacity), stage.model.hidden_size, parameter)
        self.work = Work()
        self._recent: Launch | None = None
        self._came: Arrival | None = None  # the newest: often all of it goes on, just as it is
        self._graphs = None
        if capture is not None:
            self._graphs = SegmentGraphs(runner, self.cache, self._rotation, capture, capacity=capacity)

    def open(self, slot: int, prompt: Sequence[int], attending: Sequence[int], positions: int) -> int:
        """Begin a sequence. Returns how many of its first tokens need not enter: others had them before.

        Args:
            attending: the exits that it asks and whose heads attend.
            positions: that it has blocks for from now on; they have to be free.
        """
        self.ledger.open(slot, blocks=attending)
        had = (
            self.prefixes.find(prompt[:-1], tuple(attending)) if self.prefixes is not None else []
        )  # the last one is asked
        has_room = self.blocks.reserve(slot, positions)
        assert has_room, f"no blocks are left for slot {slot}"
        own, num_known = self.blocks.of(slot), len(had) * self.blocks.size
        self.cache.copy(had, own[: len(had)])
        self._begin(own, had)
        self.ledger.append(slot, num_known)
        self.ledger.advance(slot, 0, self._num_layers, num_known)
        for layer in attending:
            self.ledger.advance_block(slot, layer, range(num_known))
        return num_known

    def reserve(self, slot: int, positions: int) -> bool:
        """See that there are blocks for so many positions of a sequence. False: there are too few."""
        num_before = len(self.blocks.of(slot))
        has_room = self.blocks.reserve(slot, positions)
        self._begin(self.blocks.of(slot)[num_before:])
        return has_room

    def keep(self, slot: int, prompt: Sequence[int]) -> None:
        """Have others begin with what has run of a sequence's prompt, at full depth; but for its last token, whose keys
        and values may be an approximation."""
        if self.prefixes is None:
            return
        attending = self.ledger.attending(slot)
        full = self.ledger.length(slot) - self.ledger.pending(slot)
        ready = min(full, len(prompt) - 1, *(self.ledger.block_length(slot, layer) for layer in attending))
        own = self.blocks.of(slot)[: ready // self.blocks.size]
        if own and self.cache.are_finite(own):
            self.prefixes.add(prompt[:ready], attending, own)

    def enter(self, tokens: Mapping[int, Sequence[int]], stop: int) -> "Arrival":
        """Append tokens to sequences, by slot, and run them up to `stop`. There have to be blocks for them."""
        for slot, new in tokens.items():
            has_room = self.reserve(slot, self.ledger.length(slot) + len(new))
            assert has_room, f"no blocks are left for slot {slot}"
        rows = [SequenceRows(slot, self.ledger.append(slot, len(new))) for slot, new in tokens.items()]
        entering = [token for new in tokens.values() for token in new]
        return self._run(self._launch(rows), self._runner.embed(entering), 0, stop)

    def advance(self, counts: Mapping[int, int | None], start: int, stop: int) -> "Arrival":
        """Run positions that wait at `start` up to `stop`.

        Args:
            counts: how many of each sequence, by slot, those first that have waited longest; None: all.
        """
        rows = [SequenceRows(slot, self.ledger.waiting(slot, start, stop)[:count]) for slot, count in counts.items()]
        launch, came = self._launch(rows), self._came
        if came is not None and came.layer == start and came.launch is launch:
            return self._run(launch, came.output_NH, start, stop)
        return self._run(launch, self._states.read(start, launch), start, stop)

    def catch_up(self, slots: Sequence[int]) -> None:
        """Take all that waits, in these sequences, through all layers."""
        for start, stop in pairwise((*self._exits, self._num_layers)):
            if waiting := [slot for slot in slots if self.ledger.waiting(slot, start, stop)]:
                self.advance(dict.fromkeys(waiting), start, stop)

    def take_back(self, slot: int, length: int) -> int:
        """Forget all but the first positions of a sequence. Returns how many are forgotten."""
        if positions := self.ledger.truncate(slot, length):
            self.cache.clear(slot, positions)
        return len(positions)

    def close(self, slot: int) -> None:
        """Forget a sequence; its blocks are free. Those that others may begin with stay as they are until they are
        taken."""
        own = self.blocks.of(slot)
        kept = [number for number, block in enumerate(own) if self.prefixes is not None and block in self.prefixes]
        num_left = kept[-1] + 1 if kept else 0
        self.take_back(slot, num_left * self.blocks.size)
        self.cache.clear_blocks([block for number, block in enumerate(own[:num_left]) if number not in kept])
        self.ledger.close(slot)
        self.blocks.release(slot)
        self._recent = self._came = None  # the same positions of another sequence are somewhere else

    def propagate(self, slots: Sequence[int], start: int) -> None:
        """Give all layers above `start` the keys and values of the states that wait there, as they are. Not exact."""
        stop = self._num_layers
        rows = [SequenceRows(slot, self.ledger.waiting(slot, start, stop)) for slot in slots]
        launch = self._launch(rows)
        x_NH = self._states.read(start, launch)
        self._runner.store(x_NH, launch, start, stop)
        self.work.stores[start, stop] += 1
        self.work.stored[start, stop] += launch.num_rows
        self._arrive(rows, start, stop)
        for layer in self._exits:
            asking = [slot for slot in slots if layer > start and self.ledger.has_block(slot, layer)]
            if asking:
                self._runner.store_block(*self._of_block(asking, rows, x_NH, layer), layer)

    def _begin(self, taken: Sequence[int], filled: Sequence[int] = ()) -> None:
        """Blocks that a sequence has taken hold something new: copies of others first, then zeros."""
        if self.prefixes is None:
            return
        self.cache.clear_blocks([block for block in taken[len(filled) :] if block in self.prefixes])
        for number, block in enumerate(taken):
            if number >= len(filled) or block != filled[number]:
                self.prefixes.forget(block)

    def _run(self, launch: Launch, x_NH: torch.Tensor, start: int, stop: int) -> "Arrival":
        rows = launch.rows
        y_NH, taps = (self._graphs or self._runner).run(x_NH, launch, start, stop)
        self.work.launches[start, stop] += 1
        self.work.rows[start, stop] += launch.num_rows
        self._arrive(rows, start, stop)
        if stop < self._num_layers:
            self._states.write(stop, launch, y_NH)
        features = None
        for layer in self._blocks:
            asking = [slot for slot, _ in rows if self.ledger.has_block(slot, layer)] if layer in taps else ()
            if asking:
                hidden_NH, block_launch = self._of_block(asking, rows, taps[layer], layer)
                features = Features(block_launch, self._runner.features(hidden_NH, layer, block_launch))
        self._came = Arrival(self._runner, stop, launch, x_NH, y_NH, taps[stop], features)
        return self._came

    def _of_block(
        self, slots: Sequence[int], rows: Sequence[SequenceRows], x_NH: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, Launch]:
        """The rows of sequences that ask the block of an exit's head, which they have reached now."""
        own = [of for of in rows if of.slot in set(slots)]
        for slot, positions in own:
            self.ledger.advance_block(slot, layer, positions)
        if len(own) == len(rows):
            return x_NH, self._launch(own)
        is_own_N = [of.slot in set(slots) for of in rows for _ in of.positions]
        return x_NH[torch.tensor(is_own_N, device=x_NH.device)], self._launch(own)

    def _launch(self, rows: Sequence[SequenceRows]) -> Launch:
        """The rows of one segment are often those of the one before."""
        if self._recent is None or self._recent.rows != rows:
            self._recent = Launch(rows, self.cache, self._rotation)
        return self._recent

    def _arrive(self, rows: Sequence[SequenceRows], start: int, stop: int) -> None:
        for slot, positions in rows:
            assert self.ledger.advance(slot, start, stop, len(positions)) == positions


class Features(NamedTuple):
    """What the block of an exit's head made of the rows of the sequences that ask it."""

    launch: Launch
    features_NH: torch.Tensor


class Arrival(NamedTuple):
    """Rows that have come to an exit, or to the end."""

    runner: Runner
    layer: int
    launch: Launch
    input_NH: torch.Tensor
    output_NH: torch.Tensor
    hidden_NH: torch.Tensor
    features: Features | None

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
