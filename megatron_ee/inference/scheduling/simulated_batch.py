"""A batch without a model: sequences whose depths are given, over the engine's own ledger."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_ee.config import KvPolicy
from megatron_ee.inference.ledger import DepthLedger
from megatron_ee.inference.scheduling.fronts import Front, LaunchPlan
from megatron_ee.inference.stages import Stages, depths_of


@dataclass(slots=True)
class SimulatedSequence:
    """
    Attributes:
        index: of its request.
        depths: of each new token, the layers after which it leaves.
        stops: exits at which its tokens are looked at, ascending.
        unfed: tokens that have yet to enter.
        at, since: see `DecodingSequence`.
        said: how many tokens.
        times: when, of each that has been said.
    """

    index: int
    depths: tuple[int, ...]
    stops: tuple[int, ...]
    unfed: int
    at: int = 0
    since: int = 0
    said: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return self.said == len(self.depths)

    def next_stop(self, num_layers: int) -> int:
        """Where its rows are looked at next."""
        return next((stop for stop in self.stops if stop > self.at), num_layers)

    def say(self) -> None:
        self.said += 1
        self.unfed, self.at = 1, 0


@dataclass(frozen=True, slots=True)
class SimulatedFlight:
    """A launch that is under way.

    Attributes:
        sequences: by slot, of all its rows.
        num_looked_at: of the sequences that it is for.
        saying: slots of those that say a token when it ends.
    """

    plan: LaunchPlan
    sequences: Mapping[int, SimulatedSequence]
    num_looked_at: int
    saying: Sequence[int]


@dataclass(frozen=True, slots=True)
class Landing:
    """What the end of a launch brings with it.

    Attributes:
        stored: positions whose keys and values are made without running layers.
        caught_up: launches of positions that have waited: the layers before, the last layer, rows.
    """

    stored: int = 0
    caught_up: Sequence[tuple[int, int, int]] = ()


class SimulatedBatch:
    """What `Batch` does, for the planners.

    Args:
        exits: of the model; positions may wait at them.
        residents: sequences at a time.
        carries: see `Planner.carries`.

    Attributes:
        num_layers: of the model.
        num_launches: that have begun.
        crowded: slots of those that may not go on before what waits of them has caught up.
    """

    def __init__(
        self,
        exits: Sequence[int],
        stages: Stages,
        *,
        residents: int,
        prefill_chunk: int,
        kv_policy: KvPolicy,
        max_pending: int,
        carries: bool,
    ) -> None:
        self._stages, self._depths, self.num_layers = stages, depths_of(exits, stages), stages.stops[-1]
        self._residents, self._chunk, self._max_pending = residents, prefill_chunk, max_pending
        self._propagates = kv_policy == "propagate"
        self._fills = kv_policy == "fill" or (carries and not self._propagates)
        self._ledger = DepthLedger(self._depths)
        self._sequences: dict[int, SimulatedSequence] = {}
        self._under_way: set[int] = set()
        self.num_launches = 0
        self.crowded: Collection[int] = set()

    @property
    def num_going(self) -> int:
        return len(self._sequences)

    def join(self, sequence: SimulatedSequence) -> bool:
        """Take in a sequence. False: there is no free slot."""
        slot = next((slot for slot in range(self._residents) if slot not in self._sequences), None)
        if slot is None:
            return False
        self._ledger.open(slot)
        sequence.since = self.num_launches
        self._sequences[slot] = sequence
        return True

    def remove_ended(self) -> list[SimulatedSequence]:
        """Forget those that have said all; returns them."""
        ended = [slot for slot, of in self._sequences.items() if of.has_ended]
        for slot in ended:
            self._ledger.close(slot)
        self.crowded = {*self.crowded} - {*ended}
        return [self._sequences.pop(slot) for slot in ended]

    def fronts(self) -> list[Front]:
        """Of all that are neither under way nor crowded."""
        held = {*self._under_way, *self.crowded}
        return [self._front(slot, of) for slot, of in self._sequences.items() if slot not in held]

    @property
    def fillers(self) -> list[int]:
        """Whose positions may run along because there is room."""
        return [*self._sequences] if self._fills else []

    def ready(self, slot: int, start: int, stop: int) -> int:
        return self._ledger.ready(slot, start, stop)

    def depart(self, plan: LaunchPlan) -> SimulatedFlight:
        self.num_launches += 1
        sequences = {slot: self._sequences[slot] for slot in (*plan.counts, *plan.fills)}
        self._under_way.update(plan.counts)
        for slot, count in plan.counts.items() if plan.start == 0 else ():
            self._ledger.append(slot, count)
            sequences[slot].unfed -= count
        looked_at = [slot for slot in plan.counts if self._is_looked_at(sequences[slot], plan.stop)]
        saying = [slot for slot in looked_at if sequences[slot].depths[sequences[slot].said] <= plan.stop]
        return SimulatedFlight(plan, sequences, len(looked_at), saying)

    def arrive(self, flight: SimulatedFlight) -> Landing:
        plan = flight.plan
        for slot, count in (*plan.counts.items(), *plan.fills.items()):
            if self._sequences.get(slot) is flight.sequences[slot]:
                self._ledger.advance(slot, plan.start, plan.stop, count)
        self._under_way.difference_update(plan.counts)
        for slot in plan.counts:
            of = flight.sequences[slot]
            is_part = plan.stop == self.num_layers and of.unfed  # of a prompt: it makes way for the next
            of.at, of.since = 0 if is_part else plan.stop, self.num_launches
        for slot in flight.saying:
            flight.sequences[slot].say()
        return self._go_on([slot for slot in flight.saying if not flight.sequences[slot].has_ended], plan.stop)

    def _front(self, slot: int, of: SimulatedSequence) -> Front:
        rows = self._ledger.num_waiting(slot, of.at) if of.at else min(of.unfed, self._chunk)
        if self._propagates and of.at == 0 and 1 < rows == of.unfed:
            rows -= 1
        is_part = of.at == 0 and rows < of.unfed
        looked_at = self.num_layers if is_part else of.next_stop(self.num_layers)
        stop = min(looked_at, self._ledger.next_waiting(slot, of.at), self._stages.end(of.at))
        return Front(slot, of.at, rows, stop, of.since, owes=not self._propagates)

    def _is_looked_at(self, of: SimulatedSequence, depth: int) -> bool:
        return not of.unfed and (depth == self.num_layers or depth in of.stops)

    def _go_on(self, going: Sequence[int], depth: int) -> Landing:
        """What sequences that have said something need before their next token."""
        self.crowded = {slot for slot in self.crowded if self._ledger.pending(slot)}
        if depth == self.num_layers:
            return Landing()
        if self._propagates:
            counts = {slot: self._ledger.pending(slot) for slot in going}
            for slot, count in counts.items():
                self._ledger.advance(slot, depth, self.num_layers, count)
            return Landing(stored=sum(counts.values()))
        crowded = [slot for slot in going if self._ledger.pending(slot) > self._max_pending]
        if self._stages.count == 1:
            return Landing(caught_up=self._catch_up(crowded))
        self.crowded = {*self.crowded, *crowded}
        return Landing()

    def _catch_up(self, slots: Sequence[int]) -> Sequence[tuple[int, int, int]]:
        """As `DepthWalk` does it: all of them together, segment after segment."""
        launches = []
        for start, stop in pairwise(self._depths[1:]):
            counts = {slot: len(self._ledger.waiting(slot, start, stop)) for slot in slots}
            if rows := sum(counts.values()):
                for slot, count in counts.items():
                    self._ledger.advance(slot, start, stop, count)
                launches.append((start, stop, rows))
        return launches
