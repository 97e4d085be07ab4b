"""A batch of sequences that decode together, each token as deep as it needs to go."""

from collections.abc import Collection, Sequence

import torch

from megatron_ee.inference.answering import at_exit, at_the_end
from megatron_ee.inference.beginning import begin
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.depth_walk import Arrival, DepthWalk
from megatron_ee.inference.exit_decisions import ExitDecisions
from megatron_ee.inference.opened import OpenedModel
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
        self._num_layers = model.stage.model.num_layers
        room = max_pending + 1 + prefill_chunk
        self.walk = DepthWalk(
            model.runner,
            model.exits,
            slots=slots,
            capacity=self._capacity,
            room=room,
            blocks=blocks,
            keeps_prefixes=keeps_prefixes,
        )
        self.decisions = ExitDecisions(model)
        self._step = Planner(Compaction(), launch_rows=slots, prefill_chunk=prefill_chunk)
        self._launch = 0
        self._free = list(range(slots))
        self._sequences: dict[int, DecodingSequence] = {}
        self._fronts: dict[int, Front] = {}  # of those whose rows have not moved since

    @property
    def free_slots(self) -> int:
        return len(self._free)

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
        num_known = self.walk.open(slot, sequence.request.prompt, attending, positions)
        sequence.take(num_known)
        sequence.since = self._launch
        self._sequences[slot] = sequence
        return slot

    def reserve(self, slot: int) -> bool:
        """See that a sequence has blocks for its next token. False: there are too few."""
        return self.walk.reserve(slot, self._sequences[slot].next_positions)

    def may_pause(self, slot: int) -> bool:
        return self._sequences[slot].may_start_over

    def pause(self, slot: int) -> DecodingSequence:
        """Let a sequence go that may join again. What it has said is kept; what the model knows of it is not."""
        sequence = self._sequences[slot]
        sequence.start_over()
        self.remove(slot)
        return sequence

    def fronts(self) -> list[Front]:
        """Where each sequence is whose text goes on."""
        going = self._going()
        for slot, sequence in going:
            if slot not in self._fronts:
                self._fronts[slot] = self._front(slot, sequence)
        return [self._fronts[slot] for slot, _ in going]

    def plan(self, planner: Planner, fronts: Sequence[Front]) -> LaunchPlan:
        """What runs next, of these."""
        if planner.carries:
            fillers = [slot for slot, of in self._sequences.items() if of.rule.kv_policy != "propagate"]
        else:
            fillers = [slot for slot, of in self._sequences.items() if of.rule.kv_policy == "fill"]
        return planner.plan(fronts, self._launch, fillers, self._ready)

    @torch.inference_mode()
    def launch(self, plan: LaunchPlan) -> list[tuple[int, Emission | None]]:
        """Run it. Returns what is said with it, by slot: a token, or several, in order, of those that speculate. After
        one with `finish` there are no more; after None neither: there is no token to choose."""
        self._launch += 1
        for slot in (*plan.counts, *plan.fills):
            self._fronts.pop(slot, None)
        self._count(plan)
        arrival = self._run(plan)
        entering = {slot: self._sequences[slot] for slot in plan.counts}
        for sequence in entering.values():
            sequence.come_to(plan.stop, self._launch)
        if plan.stop < self._num_layers:
            spoken = at_exit(arrival, entering, self.decisions)
        else:
            spoken = at_the_end(arrival, entering, self.walk)
        self._go_on({slot for slot, _ in spoken}, plan.stop)
        return spoken

    def step(self) -> list[tuple[int, Emission]]:
        """One token of every sequence whose text goes on, or several of those that speculate; see `launch`.

        Raises:
            NoTokenError: there is none to choose in some slots, which it names.
        """
        emitted: list[tuple[int, Emission]] = []
        said: set[int] = set()
        while fronts := [front for front in self.fronts() if front.slot not in said]:
            of_launch = self.launch(self.plan(self._step, fronts))
            if silent := [slot for slot, emission in of_launch if emission is None]:
                raise NoTokenError(silent)
            emitted += [(slot, emission) for slot, emission in of_launch if emission is not None]
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
        self._fronts.pop(slot, None)
        self.walk.keep(slot, sequence.request.prompt)
        self.walk.close(slot)
        self._free = sorted((*self._free, slot))

    def _going(self) -> list[tuple[int, DecodingSequence]]:
        return [(slot, of) for slot, of in self._sequences.items() if of.finish is None and not of.is_silent]

    def _front(self, slot: int, sequence: DecodingSequence) -> Front:
        """Its prompt comes in chunks. All but the last one run through all layers, and so does all but the last token
        where an exit's keys and values would not be exact: what comes after needs it."""
        at, ledger = sequence.at, self.walk.ledger
        rows = ledger.num_waiting(slot, at) if at else min(len(sequence.unfed), self._chunk)
        if not at and rows > 1 and rows == len(sequence.unfed) and sequence.rule.kv_policy == "propagate":
            rows -= 1
        is_part = at == 0 and rows < len(sequence.unfed)
        # where rows are looked at next, or meet some of their own sequence that a neighbour's launch took there
        looked_at = self._num_layers if is_part else sequence.next_stop(at, self._num_layers)
        stop = min(looked_at, ledger.next_waiting(slot, at))
        owes, verifies = sequence.rule.kv_policy != "propagate", sequence.draft is not None and sequence.draft.is_over
        return Front(slot, at, rows, stop, sequence.since, sequence.is_drafting, owes, verifies)

    def _ready(self, slot: int, start: int, stop: int) -> int:
        """Positions that may run along because there is room; what a draft leaves at its exit is verified there."""
        return 0 if self._sequences[slot].draft else self.walk.ledger.ready(slot, start, stop)

    def _run(self, plan: LaunchPlan) -> Arrival:
        if plan.start == 0:
            return self.walk.enter(
                {slot: self._sequences[slot].take(rows) for slot, rows in plan.counts.items()}, plan.stop
            )
        return self.walk.advance({**plan.counts, **plan.fills}, plan.start, plan.stop)

    def _count(self, plan: LaunchPlan) -> None:
        """What full depth would have run for the same tokens; see `savings_of`."""
        work, entering = self.walk.work, [self._sequences[slot] for slot in plan.counts]
        if plan.start > 0:
            joining = sum(of.joins_at == plan.start for of in entering)
            work.turns += joining
            work.rounds += joining == len(entering)
            return
        is_part = [count < len(of.unfed) for count, of in zip(plan.counts.values(), entering, strict=True)]
        parts = sum(is_part)
        drafting = sum(of.is_drafting and not part for of, part in zip(entering, is_part, strict=True))
        turns = len(entering) - drafting - parts
        work.turns += turns
        work.rounds += turns > 0
        work.drafts += drafting > 0
        work.drafted += drafting
        work.prefills += parts == len(entering)

    def _go_on(self, spoken: Collection[int], layer: int) -> None:
        """What sequences that have said something need before their next token."""
        going = [(slot, of) for slot, of in self._going() if slot in spoken]
        for slot, sequence in going:
            if len(sequence.draws.answer) == 1:
                self.walk.keep(slot, sequence.request.prompt)  # its neighbours need not wait for its end
            sequence.begin_draft()
        if layer == self._num_layers:
            return
        if leaving := [slot for slot, of in going if of.rule.kv_policy == "propagate"]:
            self.walk.propagate(leaving, layer)
        if crowded := [slot for slot, of in going if self.walk.ledger.pending(slot) > of.rule.max_pending]:
            self.walk.catch_up(crowded)
