"""A batch of sequences that decode together, each token as deep as it needs to go."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from megatron_ee.errors import FieldError
from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.depth_walk import Arrival, DepthWalk
from megatron_ee.inference.exit_decisions import ExitDecisions
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Logprobs, Request
from megatron_ee.inference.sampling import Choice, Draws, NoTokenError, check_sampling, choose, logprobs_of
from megatron_ee.inference.sequences import DecodingSequence


class Batch:
    """Sequences join and leave at any time; a step is one token of each.

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
        self.walk.ledger.open(slot, blocks=[layer for layer in rule.thresholds if model.runner.attends(layer)])
        stops = rule.stops_at(model.exits)
        self._sequences[slot] = DecodingSequence(request, rule, Draws(request), stops, limit, list(prompt))
        return slot

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Emission]]:
        """One token of every sequence whose text goes on, by its slot. After one with `finish` there are no more.

        Raises:
            NoTokenError: there is none to choose in some slots, which it names; the batch is of no use any more.
        """
        self._prefill()
        emitted = [emission for slots in self._groups() for emission in self._decode(slots)]
        if crowded := [slot for slot, of in self._going() if self.walk.ledger.pending(slot) > of.rule.max_pending]:
            self.walk.catch_up(crowded)
        return emitted

    @torch.inference_mode()
    def flush(self, slots: Sequence[int]) -> None:
        """Take all pending positions of these sequences to full depth."""
        self.walk.catch_up(slots)

    def remove(self, slot: int) -> None:
        """Forget a sequence, finished or not; its slot is free."""
        del self._sequences[slot]
        self.walk.cache.clear(slot, self.walk.ledger.length(slot))
        self.walk.ledger.close(slot)
        self._free = sorted((*self._free, slot))

    def _going(self) -> list[tuple[int, DecodingSequence]]:
        return [(slot, sequence) for slot, sequence in self._sequences.items() if sequence.finish is None]

    def _prefill(self) -> None:
        """Run long prompts to full depth but for their last chunk, or their last token where an exit's keys and values
        would not be exact: what comes after needs it."""
        for slot, sequence in self._going():
            last = 1 if sequence.rule.kv_policy == "propagate" else self._chunk
            while len(sequence.unfed) > last:
                self.walk.enter({slot: sequence.take(min(self._chunk, len(sequence.unfed) - last))}, self._num_layers)

    def _groups(self) -> Iterator[list[int]]:
        """Sequences that go on, so many at a time that no launch has more new rows than a chunk."""
        group: list[int] = []
        rows = 0
        for slot, sequence in self._going():
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
        emitted: list[tuple[int, Emission]] = []
        going, start = list(slots), 0
        while going:
            stop = min(self._sequences[slot].next_stop(start, self._num_layers) for slot in going)
            if start == 0:
                arrival = self.walk.enter({slot: self._sequences[slot].take() for slot in going}, stop)
            else:
                fills = self._fills(going, start, stop, room=len(slots) - len(going))
                arrival = self.walk.advance({**dict.fromkeys(going), **fills}, start, stop)
            if stop == self._num_layers:
                emitted += self._emit(arrival.ask(going), dict.fromkeys(going, 1.0))
                break
            leaving = self._let_out(arrival, [slot for slot in going if stop in self._sequences[slot].rule.thresholds])
            emitted += leaving
            going = [slot for slot in going if slot not in dict(leaving)]
            start = stop
        return emitted

    def _fills(self, going: Sequence[int], start: int, stop: int, *, room: int) -> Mapping[int, int]:
        """Pending positions of sequences that are not on their way here, for the slots of those that left."""
        fills: dict[int, int] = {}
        for slot, sequence in self._going():
            if room and slot not in going and sequence.rule.kv_policy == "fill":
                count = min(room, self.walk.ledger.ready(slot, start, stop))
                if count:
                    fills[slot] = count
                    room -= count
        return fills

    def _let_out(self, arrival: Arrival, slots: Sequence[int]) -> list[tuple[int, Emission]]:
        """The tokens of those sequences that leave at this exit."""
        if not slots:
            return []
        asked = arrival.ask(slots)
        confidences = self.decisions.leaving(asked, [self._sequences[slot] for slot in slots])
        rows = [row for row, confidence in enumerate(confidences) if confidence is not None]
        if not rows:
            return []
        leaving = {slots[row]: confidence for row, confidence in enumerate(confidences) if confidence is not None}
        emitted = self._emit(asked.of(rows), leaving)
        self._propagate(leaving, arrival.layer)
        return emitted

    def _emit(self, asked: AskedExit, confidences: Mapping[int, float]) -> list[tuple[int, Emission]]:
        """A token for each sequence, of which the exit has a row each."""
        sequences = [self._sequences[slot] for slot in confidences]
        try:
            choices = choose(asked.logits, [sequence.draws for sequence in sequences])
        except NoTokenError as error:
            raise NoTokenError([list(confidences)[row] for row in error.rows]) from error
        emitted = []
        for row, (slot, confidence) in enumerate(confidences.items()):
            sequence, choice = sequences[row], choices[row]
            by_exit = None
            if sequence.request.sampling.exit_logprobs:
                passed = {**sequence.passed, asked.layer: asked.logits[row]}
                by_exit = {layer: _logprobs(logits_V, choice, sequence.draws) for layer, logits_V in passed.items()}
            sequence.say(choice.token)
            emission = Emission(choice.token, asked.layer, confidence, choice.logprobs, by_exit, sequence.finish)
            emitted.append((slot, emission))
        return emitted

    def _propagate(self, slots: Collection[int], layer: int) -> None:
        """Provide what an exit leaves behind at once, where that is the policy and the text goes on."""
        going = [slot for slot, of in self._going() if slot in slots and of.rule.kv_policy == "propagate"]
        if going:
            self.walk.propagate(going, layer)


def _logprobs(logits_V: torch.Tensor, choice: Choice, draws: Draws) -> Logprobs:
    (logprobs,) = logprobs_of(logits_V[None], [choice.token], draws.params.logprobs or 0)
    return logprobs
