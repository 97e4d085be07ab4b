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
    """

    prompt: int
    depths: tuple[int, ...]
    arrival: float = 0.0


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
    at: int = 0
    since: int = 0
    said: int = 0
    rows_on_their_way: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return self.request.depths[self.said]


class EngineSimulator:
    """
    Args:
        exits: after which tokens are looked at, ascending.
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
        self._planner, self._costs, self._policy = planner, costs, kv_policy
        self._depths, self._num_layers = (0, *exits, num_layers), num_layers
        self._residents, self._chunk, self._max_pending = residents, prefill_chunk, max_pending

    def run(self, requests: Sequence[SimulatedRequest]) -> SimulatedRun:
        """Serve all of them, first come, first served."""
        self._ledger = DepthLedger(self._depths)
        self._slots = SlotCounter(self._planner.launch_rows)
        self._now, self._launch = min((of.arrival for of in requests), default=0.0), 0
        started = self._now
        order = sorted(range(len(requests)), key=lambda index: (requests[index].arrival, index))
        waiting = deque(_Sequence(index, requests[index], requests[index].prompt) for index in order)
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
        fillers = [*self._by_slot] if self._policy == "fill" or self._planner.carries else []
        plan = self._planner.plan(fronts, self._launch, fillers, self._ledger.ready)
        self._launch += 1
        self._run(plan)
        ended = [of for slot in plan.counts if (of := self._look(slot, plan)) is not None]
        for slot in [slot for slot, of in self._by_slot.items() if of in ended]:
            self._ledger.close(slot)
            del self._by_slot[slot]
        return ended

    def _front(self, slot: int, of: _Sequence) -> Front:
        owes = self._policy != "propagate"
        if of.at == 0:
            rows = min(of.unfed, self._chunk)
            whole = rows == of.unfed
            return Front(slot, 0, rows, self._depths[1] if whole else self._num_layers, of.since, owes=owes)
        rows = self._ledger.num_waiting(slot, of.at)
        return Front(slot, of.at, rows, self._after(of.at), of.since, owes=owes)

    def _after(self, depth: int) -> int:
        return self._depths[self._depths.index(depth) + 1]

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
        self._now += self._costs.of(plan.start, plan.stop, plan.num_rows)
        self._now += self._costs.of_head(plan.stop, len(plan.counts))
        self._slots.count(plan)

    def _look(self, slot: int, plan: LaunchPlan) -> _Sequence | None:
        """A sequence at the end of a launch; returned if its text ends there."""
        of = self._by_slot[slot]
        if of.unfed:  # a part of its prompt
            of.at = 0 if plan.stop == self._num_layers else of.at
            return None
        if of.depth > plan.stop:
            return None
        of.times.append(self._now)
        of.said, of.unfed, of.at = of.said + 1, 1, 0
        if of.said == len(of.request.depths):
            return of
        if self._policy == "propagate":
            self._ledger.advance(
                slot, plan.stop, self._num_layers, self._ledger.pending(slot) if plan.stop < self._num_layers else 0
            )
        elif self._ledger.pending(slot) > self._max_pending:
            self._catch_up(slot)
        return None

    def _catch_up(self, slot: int) -> None:
        for start, stop in pairwise(self._depths[1:]):
            count = len(self._ledger.waiting(slot, start, stop))
            if count:
                self._ledger.advance(slot, start, stop, count)
                self._now += self._costs.of(start, stop, count)
