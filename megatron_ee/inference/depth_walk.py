"""Takes rows of sequences from depth to depth, and keeps ledger, cache and waiting states in agreement.

Where the model is split into stages, the ledger and the blocks are the same in all processes; keys and values and the
states that wait are with the layers that take them.

Shapes: N rows, B sequences, H hidden size.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise

import torch

from megatron_ee.inference.arrivals import Arrival, Features, Leg
from megatron_ee.inference.blocks import BLOCK, Blocks
from megatron_ee.inference.cuda_graphs import SegmentGraphs, capture_on
from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.launch import Launch
from megatron_ee.inference.ledger import DepthLedger
from megatron_ee.inference.prefixes import Prefixes
from megatron_ee.inference.row_places import SequenceRows
from megatron_ee.inference.runner import Runner
from megatron_ee.inference.stages import Stages, depths_of
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
        stages: where the layers are; None: all here, in one.
        agree: whether something holds in all processes.
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
        stages: Stages | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        stage = runner.stage
        self._runner, self._num_layers = runner, stage.model.num_layers
        parameter = next(stage.parameters())
        self._exits = tuple(exits)
        self._blocks = [layer for layer in (*exits, self._num_layers) if runner.attends(layer)]
        self._stages, self._agree = stages or Stages((self._num_layers,)), agree
        self._depths = depths_of(exits, self._stages)
        self.ledger = DepthLedger(self._depths)
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
        if own and self._agree(self.cache.are_finite(own)):
            self.prefixes.add(prompt[:ready], attending, own)

    def enter(self, tokens: Mapping[int, Sequence[int]], stop: int) -> Arrival:
        """Append tokens to sequences, by slot, and run them up to `stop`. There have to be blocks for them."""
        return self._go(self.append({slot: len(new) for slot, new in tokens.items()}, stop), tokens)

    def advance(self, counts: Mapping[int, int | None], start: int, stop: int) -> Arrival:
        """Run positions that wait at `start` up to `stop`; see `waiting`."""
        return self._go(self.waiting(counts, start, stop))

    def append(self, counts: Mapping[int, int], stop: int) -> Leg:
        """New positions of sequences, by slot, which are to run up to `stop`."""
        for slot, count in counts.items():
            has_room = self.reserve(slot, self.ledger.length(slot) + count)
            assert has_room, f"no blocks are left for slot {slot}"
        return Leg([SequenceRows(slot, self.ledger.append(slot, count)) for slot, count in counts.items()], 0, stop)

    def waiting(self, counts: Mapping[int, int | None], start: int, stop: int) -> Leg:
        """
        Args:
            counts: how many of each sequence, by slot, those first that have waited longest; None: all.
        """
        rows = [SequenceRows(slot, self.ledger.waiting(slot, start, stop)[:count]) for slot, count in counts.items()]
        return Leg(rows, start, stop)

    def run(self, leg: Leg, tokens: Mapping[int, Sequence[int]] | None = None) -> Arrival:
        """What comes of rows, whose layers are here; they have not arrived before `land`.

        Args:
            tokens: of rows that enter.
        """
        launch, came = self._launch(leg.rows), self._came
        if tokens is not None:
            x_NH = self._runner.embed([token for new in tokens.values() for token in new])
        elif came is not None and came.layer == leg.start and came.launch is launch:
            x_NH = came.output_NH
        else:
            x_NH = self._states.read(leg.start, launch)
        return self._run(launch, x_NH, leg.start, leg.stop)

    def land(self, leg: Leg, output_NH: torch.Tensor | None, *, gone: Collection[int] = ()) -> None:
        """Rows have come to where they were going.

        Args:
            output_NH: their states, where those that go deeper do so here.
            gone: sequences that are not there any more, by slot.
        """
        rows = [of for of in leg.rows if of.slot not in gone]
        self.work.launches[leg.start, leg.stop] += 1
        self.work.rows[leg.start, leg.stop] += sum(len(of.positions) for of in rows)
        self._arrive(rows, leg.start, leg.stop)
        for layer in self._blocks:
            if leg.start < layer <= leg.stop:
                for slot, positions in rows:
                    if self.ledger.has_block(slot, layer):
                        self.ledger.advance_block(slot, layer, positions)
        if rows and leg.stop < self._num_layers and self._stages.holds(leg.stop):
            assert output_NH is not None, "states of another stage have not come"
            if len(rows) < len(leg.rows):
                output_NH = output_NH[self._rows_of(leg.rows, {of.slot for of in rows})]
            self._states.write(leg.stop, self._launch(rows), output_NH)

    def catch_up(self, slots: Sequence[int]) -> None:
        """Take all that waits, in these sequences, through all layers."""
        for start, stop in pairwise(self._depths[1:]):
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

    def propagate(self, slots: Sequence[int], start: int, x_NH: torch.Tensor | None = None) -> None:
        """Give all layers above `start` the keys and values of the states that wait there, as they are. Not exact.

        Args:
            x_NH: these states; None: they are here, or no such layer is.
        """
        stop = self._num_layers
        rows = [SequenceRows(slot, self.ledger.waiting(slot, start, stop)) for slot in slots]
        first, last = self._stages.held(start, stop)
        if first < last:
            launch = self._launch(rows)
            if x_NH is None:
                x_NH = self._states.read(start, launch)
            self._runner.store(x_NH, launch, first, last)
        self.work.stores[start, stop] += 1
        self.work.stored[start, stop] += sum(len(positions) for _, positions in rows)
        self._arrive(rows, start, stop)
        for layer in self._exits:
            asking = {slot for slot in slots if layer > start and self.ledger.has_block(slot, layer)}
            for slot, positions in rows:
                if slot in asking:
                    self.ledger.advance_block(slot, layer, positions)
            if asking and first < layer <= last:
                assert x_NH is not None
                self._runner.store_block(*self._of_block(asking, rows, x_NH), layer)

    def _begin(self, taken: Sequence[int], filled: Sequence[int] = ()) -> None:
        """Blocks that a sequence has taken hold something new: copies of others first, then zeros."""
        if self.prefixes is None:
            return
        self.cache.clear_blocks([block for block in taken[len(filled) :] if block in self.prefixes])
        for number, block in enumerate(taken):
            if number >= len(filled) or block != filled[number]:
                self.prefixes.forget(block)

    def _go(self, leg: Leg, tokens: Mapping[int, Sequence[int]] | None = None) -> Arrival:
        arrival = self.run(leg, tokens)
        self.land(leg, arrival.output_NH)
        return arrival

    def _run(self, launch: Launch, x_NH: torch.Tensor, start: int, stop: int) -> Arrival:
        y_NH, taps = (self._graphs or self._runner).run(x_NH, launch, start, stop)
        features = None
        for layer in self._blocks:
            asking = {slot for slot, _ in launch.rows if self.ledger.has_block(slot, layer)} if layer in taps else ()
            if asking:
                hidden_NH, block_launch = self._of_block(asking, launch.rows, taps[layer])
                features = Features(block_launch, self._runner.features(hidden_NH, layer, block_launch))
        self._came = Arrival(self._runner, stop, launch, x_NH, y_NH, taps.get(stop, y_NH), features)
        return self._came

    def _of_block(
        self, slots: Collection[int], rows: Sequence[SequenceRows], x_NH: torch.Tensor
    ) -> tuple[torch.Tensor, Launch]:
        """The rows of sequences that ask the block of an exit's head, which they have reached now."""
        own = [of for of in rows if of.slot in slots]
        if len(own) == len(rows):
            return x_NH, self._launch(own)
        return x_NH[self._rows_of(rows, slots)], self._launch(own)

    def _rows_of(self, rows: Sequence[SequenceRows], slots: Collection[int]) -> torch.Tensor:
        """Which rows are of some sequences, bool [N], on the device."""
        is_own_N = [of.slot in slots for of in rows for _ in of.positions]
        return torch.tensor(is_own_N, device=next(self._runner.stage.parameters()).device)

    def _launch(self, rows: Sequence[SequenceRows]) -> Launch:
        """The rows of one segment are often those of the one before."""
        if self._recent is None or self._recent.rows != rows:
            self._recent = Launch(rows, self.cache, self._rotation)
        return self._recent

    def _arrive(self, rows: Sequence[SequenceRows], start: int, stop: int) -> None:
        for slot, positions in rows:
            assert self.ledger.advance(slot, start, stop, len(positions)) == positions
