"""A batch of sequences that decode together, each token as deep as it needs to go."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from megatron_ee.errors import FieldError
from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.corrections import check_shared_vocabulary
from megatron_ee.inference.depth_walk import Arrival, DepthWalk
from megatron_ee.inference.exit_decisions import ExitDecisions
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.sampling import Draws, NoTokenError, check_sampling
from megatron_ee.inference.sequences import DecodingSequence
from megatron_ee.inference.speaking import speak, speak_of_drafts
from megatron_ee.inference.speculation.drafter import Drafter
from megatron_ee.inference.speculation.pace import MOST_DRAFTED, Pace


class Batch:
    """Sequences join and leave at any time; a step is one token of each, or several of those that speculate.

    No token and no depth depends on who else is in the batch, nor on the policy that provides missing keys and values,
    if it is exact.

    Attributes:
        walk: its ledger, cache and count of work are open to look at.
        decisions: counts what exits said.

    Args:
        slots: most sequences at a time.
        capacity: longest sequence, prompt and answer, in positions.
        max_pending: the largest that a request may name.
        prefill_chunk: positions of prompts that run through the model at once.
    """

    def __init__(
        self, model: OpenedModel, *, slots: int, capacity: int, max_pending: int = 256, prefill_chunk: int = 512
    ) -> None:
        self._model, self._capacity, self._max_pending, self._chunk = model, capacity, max_pending, prefill_chunk
        self._num_layers = model.stage.model.num_layers
        room = max_pending + 1 + prefill_chunk
        self.walk = DepthWalk(model.runner, model.exits, slots=slots, capacity=capacity, room=room)
        self.decisions = ExitDecisions(model)
        self._drafter = Drafter(self.walk)
        self._free = list(range(slots))
        self._sequences: dict[int, DecodingSequence] = {}

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def add(self, request: Request) -> int:
        """Take in a request; returns its slot.

        Raises:
            FieldError: it names an exit or a token that the model doesn't have, or asks a gate or a measure that isn't
                there; or prompt and answer are longer than the model's positions or the batch's capacity.
        """
        model, prompt = self._model, request.prompt
        rule = ExitRule(request.exit, model.exits, model.gated)
        model.measure_named(rule.measure)
        check_shared_vocabulary(model.stage, request.exit.mode, rule.heard)
        check_sampling(request.sampling, model.tokenizer.vocab_size)
        if rule.max_pending > self._max_pending:
            raise FieldError(
                "inference.exit.max_pending", f"{rule.max_pending} is above the batch's {self._max_pending}"
            )
        limit = request.sampling.max_new_tokens
        if model.max_positions is not None:
            limit = min(limit, model.max_positions - len(prompt) + 1)
            if limit < 1:
                raise FieldError("prompt", f"{len(prompt)} tokens, but the model has {model.max_positions} positions")
        if len(prompt) + limit - 1 > self._capacity:
            raise FieldError("prompt", f"{len(prompt)} + {limit} new tokens do not fit into {self._capacity} positions")
        slot = self._free.pop(0)
        self.walk.ledger.open(slot, blocks=[layer for layer in rule.asked if model.runner.attends(layer)])
        stops, pace = rule.stops_at(model.exits), self._pace_of(request, rule)
        self._sequences[slot] = DecodingSequence(request, rule, Draws(request), stops, limit, list(prompt), pace)
        return slot

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Emission]]:
        """One token of every sequence whose text goes on, by its slot, or several, in order, of those that speculate.
        After one with `finish` there are no more.

        Raises:
            NoTokenError: there is none to choose in some slots, which it names; the batch is of no use any more.
        """
        going = self._going()
        self._prefill(going)
        self._drafter.draft(going)
        emitted = [emission for slots in self._groups(going) for emission in self._decode(slots)]
        pending = {slot: self.walk.ledger.pending(slot) for slot, sequence in going.items() if sequence.finish is None}
        if crowded := [slot for slot, count in pending.items() if count > going[slot].rule.max_pending]:
            self.walk.catch_up(crowded)
        return emitted

    @torch.inference_mode()
    def flush(self, slots: Sequence[int]) -> None:
        """Take all pending positions of these sequences to full depth."""
        self.walk.catch_up(slots)

    def remove(self, slot: int) -> None:
        """Forget a sequence, finished or not; its slot is free."""
        del self._sequences[slot]
        self.walk.take_back(slot, 0)
        self.walk.ledger.close(slot)
        self._free = sorted((*self._free, slot))

    def _pace_of(self, request: Request, rule: ExitRule) -> Pace | None:
        if not rule.drafts:
            return None
        length = request.exit.draft_length
        costs = {layer: self._model.draft_costs[layer] for layer in rule.drafts}
        return Pace(costs, None if length == "auto" else length, most=min(MOST_DRAFTED, rule.max_pending))

    def _going(self) -> dict[int, DecodingSequence]:
        return {slot: sequence for slot, sequence in self._sequences.items() if sequence.finish is None}

    def _prefill(self, sequences: Mapping[int, DecodingSequence]) -> None:
        """Run long prompts to full depth but for their last chunk, or their last token where an exit's keys and values
        would not be exact: what comes after needs it."""
        for slot, sequence in sequences.items():
            last = 1 if sequence.rule.kv_policy == "propagate" else self._chunk
            while len(sequence.unfed) > last:
                self.walk.enter({slot: sequence.take(min(self._chunk, len(sequence.unfed) - last))}, self._num_layers)
                self.walk.work.prefills += 1

    def _groups(self, sequences: Mapping[int, DecodingSequence]) -> Iterator[list[int]]:
        """Slots, so many at a time that no launch has more new rows than a chunk."""
        group: list[int] = []
        rows = 0
        for slot, sequence in sequences.items():
            if group and rows + len(sequence.unfed) > self._chunk:
                yield group
                group, rows = [], 0
            group.append(slot)
            rows += len(sequence.unfed)
        if group:
            yield group

    def _decode(self, slots: Sequence[int]) -> list[tuple[int, Emission]]:
        """Segment after segment, with those that are still on their way."""
        self.walk.work.rounds += 1
        self.walk.work.turns += len(slots)
        emitted: list[tuple[int, Emission]] = []
        joins_at = {slot: self._sequences[slot].joins_at for slot in slots}
        going, start = list(slots), 0
        while going:
            stop = min(self._next_stop(slot, start) for slot in going)
            moving = [slot for slot in going if joins_at[slot] <= start]
            if moving:
                arrival = self._move(moving, start, stop, room=len(slots) - len(going))
                if stop == self._num_layers:
                    return emitted + self._arrive(arrival, going)
                leaving = self._let_out(arrival, moving)
                emitted += leaving
                going = [slot for slot in going if slot not in dict(leaving)]
            start = stop
        return emitted

    def _next_stop(self, slot: int, start: int) -> int:
        """Where rows are looked at next, or meet some of their own sequence that a neighbour's launch took there."""
        looked_at = self._sequences[slot].next_stop(start, self._num_layers)
        return min(looked_at, self.walk.ledger.next_waiting(slot, start))

    def _move(self, moving: Sequence[int], start: int, stop: int, *, room: int) -> Arrival:
        if start == 0:
            return self.walk.enter({slot: self._sequences[slot].take() for slot in moving}, stop)
        fills = self._fills(moving, start, stop, room=room)
        return self.walk.advance({**dict.fromkeys(moving), **fills}, start, stop)

    def _fills(self, going: Sequence[int], start: int, stop: int, *, room: int) -> Mapping[int, int]:
        """Pending positions of sequences that are not on their way, for the slots of those that left."""
        fills: dict[int, int] = {}
        for slot, sequence in self._going().items():
            if room and slot not in going and sequence.draft is None and sequence.rule.kv_policy == "fill":
                count = min(room, self.walk.ledger.ready(slot, start, stop))
                if count:
                    fills[slot] = count
                    room -= count
        return fills

    def _let_out(self, arrival: Arrival, slots: Sequence[int]) -> list[tuple[int, Emission]]:
        """The tokens of those sequences that leave at this exit."""
        if heard := [slot for slot in slots if arrival.layer in self._sequences[slot].rule.heard]:
            self._hear(arrival, heard)
        slots = [slot for slot in slots if arrival.layer in self._sequences[slot].rule.thresholds]
        if not slots:
            return []
        asked = arrival.ask(slots)
        confidences = self.decisions.leaving(asked, [self._sequences[slot] for slot in slots])
        rows = [row for row, confidence in enumerate(confidences) if confidence is not None]
        if not rows:
            return []
        leaving = {slots[row]: confidence for row, confidence in enumerate(confidences) if confidence is not None}
        emitted = self._speak(asked.of(rows), leaving)
        self._propagate(leaving, arrival.layer)
        return emitted

    def _hear(self, arrival: Arrival, slots: Sequence[int]) -> None:
        """What this exit says, of sequences whose final logits it corrects."""
        asked = arrival.ask(slots)
        for row, slot in enumerate(slots):
            sequence = self._sequences[slot]
            logits_NV = asked.logits if sequence.request.exit.hears_heads else asked.output_logits
            sequence.passed[arrival.layer] = logits_NV[row]

    def _arrive(self, arrival: Arrival, slots: Sequence[int]) -> list[tuple[int, Emission]]:
        """What full depth says: a token of each sequence, or of its draft what is right, and a token."""
        drafts = {slot: draft.num_rows for slot in slots if (draft := self._sequences[slot].draft) is not None}
        if not drafts:
            return self._speak(arrival.ask(slots), dict.fromkeys(slots, 1.0))
        plain = [slot for slot in slots if slot not in drafts]
        asked = arrival.ask_last({**dict.fromkeys(plain, 1), **drafts})
        num_rows = len(asked.logits)  # of both kinds, in one product
        emitted = self._speak(asked.of(range(len(plain))), dict.fromkeys(plain, 1.0)) if plain else []
        sequences = [self._sequences[slot] for slot in drafts]
        texts = speak_of_drafts(asked.of(range(len(plain), num_rows)), sequences)
        for (slot, sequence), text in zip(zip(drafts, sequences, strict=True), texts, strict=True):
            self.walk.work.taken_back += self.walk.take_back(slot, sequence.num_positions)
            emitted += [(slot, emission) for emission in text]
        # where a drafted token has overflowed, so have the rows before it: attention multiplies by 0 what it masks out
        silent = [slot for slot, text in zip(drafts, texts, strict=True) if not text]
        return emitted + self._decode(silent) if silent else emitted

    def _speak(self, asked: AskedExit, confidences: Mapping[int, float]) -> list[tuple[int, Emission]]:
        """A token for each sequence, of which the exit has a row each."""
        slots = list(confidences)
        with _named(slots):
            emissions = speak(asked, [self._sequences[slot] for slot in slots], list(confidences.values()))
        return list(zip(slots, emissions, strict=True))

    def _propagate(self, slots: Collection[int], layer: int) -> None:
        """Provide what an exit leaves behind at once, where that is the policy and the text goes on."""
        going = [slot for slot, of in self._going().items() if slot in slots and of.rule.kv_policy == "propagate"]
        if going:
            self.walk.propagate(going, layer)


@contextmanager
def _named(slots: Sequence[int]) -> Iterator[None]:
    """Names what is wrong by slots, not by rows."""
    try:
        yield
    except NoTokenError as error:
        raise NoTokenError([slots[row] for row in error.rows]) from error
