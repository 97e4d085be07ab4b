"""Serves requests that come at any time: takes in, launches, gives back."""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_ee.errors import StageLostError
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.launches import launches_of
from megatron_ee.inference.request import Emission, Failure, Reply, Request
from megatron_ee.inference.sampling import NoTokenError
from megatron_ee.inference.scheduling.fronts import Front
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.sequences import DecodingSequence


@dataclass(slots=True, order=True)
class _Task:
    """A request on its way; those that come first in order are served first, and never make way for later ones."""

    priority: int
    number: int
    sequence: DecodingSequence = field(compare=False)
    deadline: float | None = field(compare=False)
    slot: int | None = field(default=None, compare=False)


class Engine:
    """Requests wait until there is room, first come, first served. No token depends on who else is there, on the order
    of arrival, on the strategy, on stages, or on how often a request had to make way.

    Nothing in here looks at a clock: the engines of several ranks that are told the same do the same.

    Attributes:
        batch: its places; its ledger, cache and count of work are open to look at.
        num_paused: how often a request had to make way for another.

    Args:
        batch: empty.
        planner: says what runs next; a pipeline's plans for each of its stages.
        whole: a request is taken in when there are blocks for its longest answer; otherwise when there are some for its
            prompt, and where they run out later, the ones that came last make way and start over.
        recorder: notes a pipeline's launches.
    """

    def __init__(
        self, batch: Batch, planner: Planner | StagePlanner, *, whole: bool = True, recorder: Recorder | None = None
    ) -> None:
        self.batch, self._launches, self._whole = batch, launches_of(batch, planner, recorder), whole
        self.num_paused = 0
        self._lost: StageLostError | None = None
        self._tasks: dict[int, _Task] = {}
        self._waiting: list[_Task] = []
        self._inside: dict[int, _Task] = {}
        self._next = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._tasks

    @property
    def is_lost(self) -> bool:
        """Whether a stage in another process is gone, so that nothing can be served any more."""
        return self._lost is not None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request, *, priority: int = 0, deadline: float | None = None) -> int:
        """Take in a request. Returns its number.

        Args:
            priority: those with a lower one are served first.
            deadline: on the clock of `step`: it fails if it has not ended by then.

        Raises:
            FieldError: see `Batch.begin`.
            StageLostError: a stage is lost, and the engine of no use any more.
        """
        if self._lost is not None:
            raise self._lost
        task = _Task(priority, self._next, self.batch.begin(request), deadline)
        self._next += 1
        self._tasks[task.number] = task
        insort(self._waiting, task)
        return task.number

    def abort(self, number: int) -> None:
        """Forget a request, wherever it is; nothing more is said of it. One that has ended or is unknown is none."""
        if (task := self._tasks.pop(number, None)) is None:
            return
        if task.slot is None:
            self._waiting.remove(task)
        else:
            del self._inside[task.slot]
            self.batch.remove(task.slot)

    def close(self) -> None:
        """Forget all requests, and leave nothing under way. Where stages are in other processes, none of these may end,
        or make another engine, before."""
        if self._lost is None:
            for number in list(self._tasks):
                self.abort(number)
            self._launches.settle()

    def step(self, now: float = 0.0) -> list[tuple[int, Reply]]:
        """Run one launch; on a pipeline, as many as its stages have time for. Returns what is said with it: of a
        request, by its number, the scores of its prompt, if it wants them, and then a token or several. After one with
        `finish`, or a failure, there are no more.

        Args:
            now: for deadlines, on any clock that goes forward.
        """
        try:
            return self._step(now)
        except StageLostError as error:
            return self._end_all(error)

    def _step(self, now: float) -> list[tuple[int, Reply]]:
        said = self._end_late(now)
        self._admit()
        spoken = self._launches.step(self._fronts())
        said += [(self._inside[slot].number, emission or _SILENT) for slot, emission in spoken]
        for number, of in said:
            if isinstance(of, Failure) or (isinstance(of, Emission) and of.finish is not None):
                self.abort(number)
        return said

    def _end_all(self, error: StageLostError) -> list[tuple[int, Reply]]:
        """What a lost stage held of requests is nowhere else."""
        numbers, self._lost = list(self._tasks), error
        self._tasks.clear()
        self._waiting.clear()
        self._inside.clear()
        return [(number, Failure(str(error))) for number in numbers]

    def _end_late(self, now: float) -> list[tuple[int, Reply]]:
        late = [of.number for of in self._tasks.values() if of.deadline is not None and of.deadline <= now]
        for number in late:
            self.abort(number)
        return [(number, _LATE) for number in late]

    def _admit(self) -> None:
        """Strictly in order: who needs little does not overtake who needs much."""
        while self._waiting:
            task = self._waiting[0]
            whole = self._whole or not task.sequence.may_start_over
            spare = 0 if self._whole else len(self._inside) * self.batch.walk.blocks.size  # so that they can go on
            task.slot = self.batch.join(task.sequence, whole=whole, spare=spare)
            if task.slot is None:
                return
            self._inside[task.slot] = self._waiting.pop(0)

    def _fronts(self) -> Sequence[Front]:
        """Of all that have room for their next token."""
        fronts = self.batch.fronts()
        if self._whole:
            return fronts
        entering = sorted((self._inside[front.slot], front.slot) for front in fronts if front.at == 0)
        stuck = {slot for task, slot in entering if task.slot is not None and not self._make_room(task, slot)}
        return [front for front in self.batch.fronts() if front.slot not in stuck]

    def _make_room(self, task: _Task, slot: int) -> bool:
        """For its next token, by later ones that make way. One that nobody makes way for waits; the first of all never
        waits for long: those that are under way end, or come to where they can be paused."""
        while not self.batch.reserve(slot):
            later = [of for of in self._inside.values() if of > task and self.batch.may_pause(_slot_of(of))]
            if not later:
                return False
            self._pause(max(later))
        return True

    def _pause(self, task: _Task) -> None:
        slot = _slot_of(task)
        self.batch.pause(slot)
        del self._inside[slot]
        task.slot = None
        insort(self._waiting, task)
        self.num_paused += 1


_LATE = Failure("it has not ended by its deadline")
_SILENT = Failure(f"no token can be chosen: {NoTokenError.reason}")


def _slot_of(task: _Task) -> int:
    assert task.slot is not None
    return task.slot
