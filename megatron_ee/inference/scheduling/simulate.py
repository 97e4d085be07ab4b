"""The engine without a model: the same planner over the same ledger, with depths that are given and costs for time."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_ee.config import KvPolicy
from megatron_ee.inference.ledger import DepthLedger
from megatron_ee.inference.scheduling.costs import Segment, SegmentCosts
from megatron_ee.inference.scheduling.fronts import Front, LaunchPlan
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.slots import SlotCounter, SlotUse


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """
    Attributes:
        prompt: its tokens' number.
        depths: of each new token, the layers after which it leaves.
        arrival: when it comes.
        exits: at which its tokens are looked at, ascending; None: all.
    """

    prompt: int
    depths: tuple[int, ...]
    arrival: float = 0.0
    exits: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """
    Attributes:
        seconds: from the first arrival to the last token.
        times: of each request, when each of its tokens was said.
        use: by segment.
        forced: tokens that left at another depth than their own: none, ever.
    """

    requests: Sequence[SimulatedRequest]
    seconds: float
    times: Sequence[Sequence[float]]
    use: Mapping[Segment, SlotUse]
    forced: int = 0

    @property
    def tokens_per_second(self) -> float:
        """0 without requests."""
        return sum(map(len, self.times)) / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Sequence:
    index: int
    request: SimulatedRequest
    unfed: int
    stops: tuple[int, ...]
    at: int = 0
    since: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Of the token that is on its way."""
        return self.request.depths[len(self.times)]

    @property
    def has_ended(self) -> bool:
        return len(self.times) == len(self.request.depths)

    def say(self, now: float) -> None:
        self.times.append(now)
        self.unfed, self.at = 1, 0


class EngineSimulator:
    """
    Args:
        exits: of the model; positions may wait at them.
        costs: of launches and heads.
        residents: sequences at a time.
    """

    def __init__(
        self,
        planner: Planner,
        costs: SegmentCosts,
        exits: Sequence[int],
        num_layers: int,
        *,
        residents: int,
        prefill_chunk: int = 512,
        kv_policy: KvPolicy = "recompute",
        max_pending: int = 256,
    ) -> None:
        self._planner, self._costs, self._propagates = planner, costs, kv_policy == "propagate"
        self._fills = kv_policy == "fill" or (planner.carries and not self._propagates)
        self._exits, self._num_layers = tuple(exits), num_layers
        self._residents, self._chunk, self._max_pending = residents, prefill_chunk, max_pending

    def run(self, requests: Sequence[SimulatedRequest]) -> SimulatedRun:
        """Serve all of them, first come, first served."""
        self._ledger = DepthLedger((0, *self._exits, self._num_layers))
        self._slots = SlotCounter(self._planner.launch_rows)
        self._now, self._launch = min((of.arrival for of in requests), default=0.0), 0
        started = self._now
        order = sorted(range(len(requests)), key=lambda index: (requests[index].arrival, index))
        waiting = deque(self._sequence(index, requests[index]) for index in order)
        self._by_slot: dict[int, _Sequence] = {}
        times: dict[int, list[float]] = {}
        while waiting or self._by_slot:
            self._admit(waiting)
            if not self._by_slot:
                self._now = waiting[0].request.arrival
                continue
            for of in self._step():
                times[of.index] = of.times
        said = [times[index] for index in range(len(requests))]
        return SimulatedRun(requests, self._now - started, said, self._slots.use)

    def _sequence(self, index: int, request: SimulatedRequest) -> _Sequence:
        return _Sequence(index, request, request.prompt, self._exits if request.exits is None else request.exits)

    def _admit(self, waiting: deque[_Sequence]) -> None:
        free = [slot for slot in range(self._residents) if slot not in self._by_slot]
        while waiting and free and waiting[0].request.arrival <= self._now:
            slot = free.pop(0)
            self._by_slot[slot] = waiting.popleft()
            self._by_slot[slot].since = self._launch
            self._ledger.open(slot)

    def _step(self) -> list[_Sequence]:
        """One launch. Returns the sequences that end with it."""
        fronts = [self._front(slot, of) for slot, of in self._by_slot.items()]
        fillers = [*self._by_slot] if self._fills else []
        plan = self._planner.plan(fronts, self._launch, fillers, self._ledger.ready)
        self._launch += 1
        self._run(plan)
        saying = [slot for slot in plan.counts if self._says(slot, plan.stop)]
        self._go_on(saying, plan.stop)
        self._now += self._costs.step + self._costs.token * len(saying)
        for slot in saying:
            self._by_slot[slot].say(self._now)
        ended = [slot for slot in saying if self._by_slot[slot].has_ended]
        for slot in ended:
            self._ledger.close(slot)
        return [self._by_slot.pop(slot) for slot in ended]

    def _front(self, slot: int, of: _Sequence) -> Front:
        """As `Batch` has it."""
        rows = self._ledger.num_waiting(slot, of.at) if of.at else min(of.unfed, self._chunk)
        if self._propagates and of.at == 0 and 1 < rows == of.unfed:
            rows -= 1
        is_part = of.at == 0 and rows < of.unfed
        looked_at = self._num_layers if is_part else self._next_stop(of)
        stop = min(looked_at, self._ledger.next_waiting(slot, of.at))
        return Front(slot, of.at, rows, stop, of.since, owes=not self._propagates)

    def _next_stop(self, of: _Sequence) -> int:
        return next((stop for stop in of.stops if stop > of.at), self._num_layers)

    def _run(self, plan: LaunchPlan) -> None:
        for slot, count in plan.counts.items():
            of = self._by_slot[slot]
            if plan.start == 0:
                self._ledger.append(slot, count)
                of.unfed -= count
            self._ledger.advance(slot, plan.start, plan.stop, count)
            of.at, of.since = plan.stop, self._launch
        for slot, count in plan.fills.items():
            self._ledger.advance(slot, plan.start, plan.stop, count)
        looked = sum(self._is_looked_at(slot, plan.stop) for slot in plan.counts)
        self._now += self._costs.of(plan.start, plan.stop, plan.num_rows) + self._costs.of_head(plan.stop, looked)
        self._slots.count(plan)

    def _is_looked_at(self, slot: int, depth: int) -> bool:
        of = self._by_slot[slot]
        return not of.unfed and (depth == self._num_layers or depth in of.stops)

    def _says(self, slot: int, depth: int) -> bool:
        """Whether a sequence says its token there; a part of a prompt makes way for the next."""
        of = self._by_slot[slot]
        if of.unfed:
            of.at = 0 if depth == self._num_layers else of.at
            return False
        return self._is_looked_at(slot, depth) and of.depth <= depth

    def _go_on(self, saying: Sequence[int], depth: int) -> None:
        """What sequences that have said something need before their next token."""
        if depth == self._num_layers:
            return
        going = [
            slot for slot in saying if len(self._by_slot[slot].times) + 1 < len(self._by_slot[slot].request.depths)
        ]
        if self._propagates:
            counts = {slot: self._ledger.pending(slot) for slot in going}
            for slot, count in counts.items():
                self._ledger.advance(slot, depth, self._num_layers, count)
            self._now += self._costs.of_store(depth, self._num_layers, sum(counts.values()))
        elif crowded := [slot for slot in going if self._ledger.pending(slot) > self._max_pending]:
            self._catch_up(crowded)

    def _catch_up(self, slots: Sequence[int]) -> None:
        """As `DepthWalk` does it: all of them together, segment after segment."""
        for start, stop in pairwise((*self._exits, self._num_layers)):
            counts = {slot: len(self._ledger.waiting(slot, start, stop)) for slot in slots}
            if rows := sum(counts.values()):
                for slot, count in counts.items():
                    self._ledger.advance(slot, start, stop, count)
                self._now += self._costs.of(start, stop, rows)
                self._slots.catch_up(start, stop, rows)
