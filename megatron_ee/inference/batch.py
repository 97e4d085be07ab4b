"""A batch of sequences that decode together, each token as deep as it needs to go."""

from collections.abc import Collection, Mapping, Sequence

import torch

from megatron_ee.inference.answering import at_exit, at_the_end
from megatron_ee.inference.answers import Said, Spoken, take_in
from megatron_ee.inference.beginning import begin
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.depth_walk import DepthWalk
from megatron_ee.inference.exit_decisions import ExitDecisions
from megatron_ee.inference.flights import Flight
from megatron_ee.inference.luggage import has_luggage, with_states_before
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.progress import count, front_of, is_asked
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.sampling import NoTokenError
from megatron_ee.inference.scheduling.fronts import Front, LaunchPlan
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.strategies.compaction import Compaction
from megatron_ee.inference.sequences import DecodingSequence


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
        blocks: of keys and values; None: enough for the longest sequences in all slots.
        keeps_prefixes: prompts that begin as others did do not run that part again.
    """

    def __init__(
        self,
        model: OpenedModel,
        *,
        slots: int,
        capacity: int,
        max_pending: int = 256,
        prefill_chunk: int = 512,
        blocks: Blocks | None = None,
        keeps_prefixes: bool = False,
    ) -> None:
        self._model, self._max_pending, self._chunk = model, max_pending, prefill_chunk
        self._capacity = capacity if blocks is None else min(capacity, blocks.num_positions)
        self._num_layers, self._stages, self._ring = model.stage.model.num_layers, model.stages, model.ring
        room = max_pending + 1 + prefill_chunk
        self.walk = DepthWalk(
            model.runner,
            model.exits,
            slots=slots,
            capacity=self._capacity,
            room=room,
            blocks=blocks,
            keeps_prefixes=keeps_prefixes,
            stages=model.stages,
            agree=bool if model.ring is None else model.ring.agree,
        )
        self.decisions = ExitDecisions(model)
        self._step = Planner(Compaction(), launch_rows=slots, prefill_chunk=prefill_chunk)
        self._launch = 0
        self._free = list(range(slots))
        self._sequences: dict[int, DecodingSequence] = {}
        self._joined: dict[int, int] = {}
        self._num_joined = 0
        self._fronts: dict[int, Front] = {}  # of those whose rows have not moved since
        self._under_way: set[int] = set()
        self._crowded: set[int] = set()  # may not go on before what waits has caught up

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def num_launches(self) -> int:
        """That have begun."""
        return self._launch

    @property
    def num_going(self) -> int:
        """Sequences whose texts go on."""
        return len(self._going())

    @property
    def crowded(self) -> Collection[int]:
        """Slots of those that may not go on before what waits of them has caught up: on a pipeline it does so as stages
        have time."""
        return self._crowded

    def begin(self, request: Request) -> DecodingSequence:
        """What may join.

        Raises:
            FieldError: it never could; see `beginning.begin`.
        """
        return begin(self._model, request, capacity=self._capacity, max_pending=self._max_pending)

    def add(self, request: Request) -> int:
        """Take in a request, which there has to be room for; returns its slot.

        Raises:
            FieldError: see `begin`.
        """
        slot = self.join(self.begin(request))
        assert slot is not None, "there is no room"
        return slot

    def join(self, sequence: DecodingSequence, *, whole: bool = True, spare: int = 0) -> int | None:
        """Take in a sequence that is new, or has been paused; returns its slot. None: there is no free one, or not
        enough blocks.

        Args:
            whole: its blocks are there up to the end of its longest answer; else `reserve` has to be asked.
            spare: positions that have to stay free.
        """
        if not self._free:
            return None
        slot, blocks = self._free[0], self.walk.blocks
        positions = sequence.most_positions if whole else sequence.next_positions
        if blocks.missing(slot, positions) + spare > blocks.num_free:
            return None
        self._free.pop(0)
        attending = [layer for layer in sequence.rule.asked if self._model.runner.attends(layer)]
        num_known = self.walk.open(slot, sequence.shared_prompt, attending, positions)
        sequence.take(num_known)
        sequence.since = self._launch
        self._sequences[slot] = sequence
        self._num_joined += 1
        self._joined[slot] = self._num_joined
        return slot

    def reserve(self, slot: int) -> bool:
        """See that a sequence has blocks for its next token. False: there are too few."""
        return self.walk.reserve(slot, self._sequences[slot].next_positions)

    def may_pause(self, slot: int) -> bool:
        return slot not in self._under_way and self._sequences[slot].may_start_over

    def pause(self, slot: int) -> DecodingSequence:
        """Let a sequence go that may join again. What it has said is kept; what the model knows of it is not."""
        sequence = self._sequences[slot]
        sequence.start_over()
        self.remove(slot)
        return sequence

    def fronts(self) -> list[Front]:
        """Where each sequence is whose text goes on, and which is not under way."""
        going = [(slot, of) for slot, of in self._going() if slot not in self._under_way and slot not in self._crowded]
        for slot, sequence in going:
            if slot not in self._fronts:
                self._fronts[slot] = front_of(slot, sequence, self.walk.ledger, self._stages, prefill_chunk=self._chunk)
        return [self._fronts[slot] for slot, _ in going]

    def plan(self, planner: Planner, fronts: Sequence[Front]) -> LaunchPlan:
        """What runs next, of these."""
        return planner.plan(fronts, self._launch, self.fillers(planner.carries), self.ready)

    def fillers(self, carries: bool) -> list[int]:
        """Whose positions may run along because there is room."""
        if carries:
            return [slot for slot, of in self._sequences.items() if of.rule.kv_policy != "propagate"]
        return [slot for slot, of in self._sequences.items() if of.rule.kv_policy == "fill"]

    def ready(self, slot: int, start: int, stop: int) -> int:
        """How many of them there are; what a draft leaves at its exit is verified there."""
        return 0 if self._sequences[slot].draft else self.walk.ledger.ready(slot, start, stop)

    def launch(self, plan: LaunchPlan) -> Spoken:
        """Run it. Returns what is said with it, by slot: scores of prompts; a token, or several, in order, of those
        that draft. After one with `finish` there are no more; after None neither: there is no token to choose."""
        return self.arrive(self.depart(plan))

    @torch.inference_mode()
    def depart(self, plan: LaunchPlan) -> Flight:
        """Begin a launch: where its layers are, it is run at once. Until it arrives its rows are nowhere."""
        self._launch += 1
        sequences = {slot: self._sequences[slot] for slot in (*plan.counts, *plan.fills)}
        for slot in sequences:
            self._fronts.pop(slot, None)
        self._under_way.update(plan.counts)
        count(plan, sequences, self.walk.work)
        tokens = None
        if plan.start == 0:
            tokens = {slot: sequences[slot].take(rows) for slot, rows in plan.counts.items()}
            leg = self.walk.append(plan.counts, plan.stop)
        else:
            leg = self.walk.waiting({**plan.counts, **plan.fills}, plan.start, plan.stop)
        asks = any(is_asked(sequences[slot], plan.stop, self._num_layers) for slot in plan.counts)
        tells = asks or (
            plan.stop in self._stages.borders and any(has_luggage(sequences[slot]) for slot in plan.counts)
        )
        flight = Flight(plan, leg, sequences, {slot: self._joined[slot] for slot in sequences}, asks, tells)
        if self._stages.holds(plan.start):
            self._run(flight, tokens)
        return flight

    @torch.inference_mode()
    def arrive(self, flight: Flight) -> Spoken:
        """End a launch. Sequences that have left in the meantime are left out of it."""
        plan = flight.plan
        entering = flight.entering
        output_NH = flight.arrival.output_NH if flight.arrival is not None else None
        if self._ring is not None:
            flight.answers, output_NH = self._ring.arrive(flight, self._model.runner)
        gone = {slot for slot, number in flight.joined.items() if self._joined.get(slot) != number}
        answers = {slot: answer for slot, answer in flight.answers.items() if slot not in gone}
        self.walk.land(flight.leg, output_NH, gone=gone)
        self._under_way.difference_update(slot for slot in entering if slot not in gone)
        for sequence in (of for slot, of in entering.items() if slot not in gone):
            sequence.come_to(plan.stop, self._launch)
            if plan.stop == self._num_layers and sequence.unfed:  # a part of a prompt makes way for the next
                sequence.at = 0
        for slot in flight.sequences.keys() - gone:
            self._fronts.pop(slot, None)
        spoken = [(slot, said) for slot, answer in answers.items() for said in take_in(entering[slot], answer)]
        for slot, answer in answers.items():
            if isinstance(answer, Said) and answer.accepted is not None:  # the rest of its draft has been in vain
                self.walk.work.taken_back += self.walk.take_back(slot, entering[slot].num_positions)
        self._go_on(dict.fromkeys(slot for slot, _ in spoken), flight)
        return spoken

    def settle(self) -> None:
        """Wait until all stages have ended what was under way."""
        if self._ring is not None:
            self._ring.settle()

    def step(self) -> list[tuple[int, Emission]]:
        """One token of every sequence whose text goes on, or several of those that speculate; see `launch`. No scores.

        Raises:
            NoTokenError: there is none to choose in some slots, which it names.
        """
        emitted: list[tuple[int, Emission]] = []
        said: set[int] = set()
        while fronts := [front for front in self.fronts() if front.slot not in said]:
            of_launch = self.launch(self.plan(self._step, fronts))
            if silent := [slot for slot, emission in of_launch if emission is None]:
                raise NoTokenError(silent)
            emitted += [(slot, emission) for slot, emission in of_launch if isinstance(emission, Emission)]
            said |= {slot for slot, _ in of_launch}
        return emitted

    @torch.inference_mode()
    def flush(self, slots: Sequence[int]) -> None:
        """Take all pending positions of these sequences to full depth."""
        self._fronts.clear()
        self.walk.catch_up(slots)

    def remove(self, slot: int) -> None:
        """Forget a sequence, finished or not; its slot is free."""
        sequence = self._sequences.pop(slot)
        del self._joined[slot]
        self._fronts.pop(slot, None)
        self._under_way.discard(slot)
        self._crowded.discard(slot)
        self.walk.keep(slot, sequence.request.prompt)
        self.walk.close(slot)
        self._free = sorted((*self._free, slot))

    def _going(self) -> list[tuple[int, DecodingSequence]]:
        return [(slot, of) for slot, of in self._sequences.items() if of.finish is None and not of.is_silent]

    def _run(self, flight: Flight, tokens: Mapping[int, Sequence[int]] | None) -> None:
        entering, stop = flight.entering, flight.plan.stop
        arrival = self.walk.run(flight.leg, tokens)
        if self._stages.count > 1:
            arrival = with_states_before(arrival, flight.plan, entering, self._model.exits)
        flight.arrival = arrival
        if flight.asks:
            is_end = stop == self._num_layers
            flight.answers = at_the_end(arrival, entering) if is_end else at_exit(arrival, entering, self.decisions)
        if self._ring is not None:
            self._ring.depart(flight, self._model.runner)

    def _go_on(self, spoken: Collection[int], flight: Flight) -> None:
        """What sequences that have said something need before their next token."""
        layer, ledger = flight.plan.stop, self.walk.ledger
        going = [(slot, of) for slot, of in self._going() if slot in spoken]
        for slot, sequence in going:
            if len(sequence.draws.answer) == 1:
                self.walk.keep(slot, sequence.request.prompt)  # its neighbours need not wait for its end
            sequence.begin_draft()
        self._crowded = {slot for slot in self._crowded if ledger.pending(slot)}
        if layer == self._num_layers:
            return
        if leaving := [slot for slot, of in going if of.rule.kv_policy == "propagate"]:
            states_NH = self._ring.states_of(flight, leaving) if self._ring is not None else None
            self.walk.propagate(leaving, layer, states_NH)
        if crowded := [slot for slot, of in going if ledger.pending(slot) > of.rule.max_pending]:
            if self._stages.count > 1:
                self._crowded.update(crowded)
            else:
                self.walk.catch_up(crowded)
