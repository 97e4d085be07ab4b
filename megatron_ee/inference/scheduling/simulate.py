"""The engine without a model: the same planners over the same ledger, with depths that are given and costs for time."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ee.config import KvPolicy
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.scheduling.costs import Segment, SegmentCosts
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.simulated_batch import SimulatedBatch, SimulatedSequence
from megatron_ee.inference.scheduling.simulated_launches import SimulatedLaunches, SimulatedPipeline, SimulatedSingle
from megatron_ee.inference.scheduling.slots import SlotCounter, SlotUse, StageUse
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.stages import Stages


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
        stages: of a pipeline, what each did until all was done; none: there is no pipeline.
    """

    requests: Sequence[SimulatedRequest]
    seconds: float
    times: Sequence[Sequence[float]]
    use: Mapping[Segment, SlotUse]
    forced: int = 0
    stages: Sequence[StageUse] = ()

    @property
    def tokens_per_second(self) -> float:
        """0 without requests."""
        return sum(map(len, self.times)) / self.seconds if self.seconds else 0.0


class EngineSimulator:
    """
    Args:
        planner: a pipeline's plans for each of its stages, which are in processes of their own.
        costs: of launches and heads; of a pipeline, cut where its stages end.
        exits: of the model; positions may wait at them.
        residents: sequences at a time.
        recorder: notes a pipeline's launches.
    """

    def __init__(
        self,
        planner: Planner | StagePlanner,
        costs: SegmentCosts,
        exits: Sequence[int],
        num_layers: int,
        *,
        residents: int,
        prefill_chunk: int = 512,
        kv_policy: KvPolicy = "recompute",
        max_pending: int = 256,
        recorder: Recorder | None = None,
    ) -> None:
        self._planner, self._costs, self._exits, self._recorder = planner, costs, tuple(exits), recorder
        self._stages = planner.stages if isinstance(planner, StagePlanner) else Stages((num_layers,))
        assert self._stages.stops[-1] == num_layers, "the stages are another model's"
        self._residents, self._chunk, self._max_pending = residents, prefill_chunk, max_pending
        self._kv_policy: KvPolicy = kv_policy

    def run(self, requests: Sequence[SimulatedRequest]) -> SimulatedRun:
        """Serve all of them, first come, first served."""
        started = min((of.arrival for of in requests), default=0.0)
        batch, slots = self._make_batch(), SlotCounter(self._planner.launch_rows)
        launches = self._make_launches(batch, slots, started)
        order = sorted(range(len(requests)), key=lambda index: (requests[index].arrival, index))
        waiting = deque(order)
        times: dict[int, list[float]] = {}
        while waiting or batch.num_going:
            while waiting and requests[waiting[0]].arrival <= launches.now:
                if not batch.join(self._sequence(waiting[0], requests[waiting[0]])):
                    break
                waiting.popleft()
            if not batch.num_going:
                launches.wait(requests[waiting[0]].arrival)
                continue
            launches.step()
            times |= {of.index: of.times for of in batch.remove_ended()}
        said = [times[index] for index in range(len(requests))]
        return SimulatedRun(requests, launches.now - started, said, slots.use, stages=launches.stages)

    def _make_batch(self) -> SimulatedBatch:
        return SimulatedBatch(
            self._exits,
            self._stages,
            residents=self._residents,
            prefill_chunk=self._chunk,
            kv_policy=self._kv_policy,
            max_pending=self._max_pending,
            carries=self._planner.carries,
        )

    def _make_launches(self, batch: SimulatedBatch, slots: SlotCounter, now: float) -> SimulatedLaunches:
        if isinstance(self._planner, StagePlanner):
            return SimulatedPipeline(batch, self._planner, self._costs, slots, now=now, recorder=self._recorder)
        return SimulatedSingle(batch, self._planner, self._costs, slots, now=now)

    def _sequence(self, index: int, of: SimulatedRequest) -> SimulatedSequence:
        stops = self._exits if of.exits is None else of.exits
        return SimulatedSequence(index, of.depths, stops, of.prompt)
