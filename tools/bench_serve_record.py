"""The real engine, recorded: when each token was said, what every launch took, and how full it was.

Its clock is the CPU time of its own work, which jumps to the next arrival where there is nothing to do: so a busy
machine makes nobody wait.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch

from megatron_ee.inference.answers import Spoken
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.launch import Launch
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.runner import Runner
from megatron_ee.inference.scheduling.fronts import LaunchPlan
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.simulate import SimulatedRequest
from megatron_ee.inference.scheduling.slots import SlotCounter

if TYPE_CHECKING:
    from megatron_ee.inference.asked_exit import AskedExit
    from megatron_ee.inference.measures import Measure
    from megatron_ee.inference.opened import OpenedModel

_T = TypeVar("_T")


Kind = Literal["layers", "store", "head"]


class Part(NamedTuple):
    """Work on so many rows: layers, keys and values alone, or a head, which has a layer and no segment.

    Attributes:
        prompts: rows of a prompt are among them.
    """

    kind: Kind
    start: int
    stop: int
    rows: int
    seconds: float
    prompts: bool = False


class Stopwatch:
    """
    Attributes:
        parts: since somebody last took them away.
        prompts: whether those that come now have rows of prompts.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.prompts = False
        self._inside = False

    def run(self, kind: Kind, start: int, stop: int, rows: int, work: Callable[[], _T]) -> _T:
        """Time it, unless it is a part of what is timed already."""
        if self._inside:
            return work()
        self._inside = True
        started = time.process_time()
        done = work()
        self.parts.append(Part(kind, start, stop, rows, time.process_time() - started, self.prompts))
        self._inside = False
        return done

    def taken(self) -> list[Part]:
        parts, self.parts = self.parts, []
        return parts


def watched(model: "OpenedModel", watch: Stopwatch) -> "OpenedModel":
    """The same model, with all that it computes timed."""
    measures = {name: _watched_measure(measure, watch) for name, measure in model.measures.items()}
    timed = replace(model, measures=measures)
    timed.__dict__["runner"] = _WatchedRunner(model, watch)
    return timed


class _WatchedRunner(Runner):
    def __init__(self, model: "OpenedModel", watch: Stopwatch) -> None:
        super().__init__(model.stage, model.tokenizer.vocab_size, packs=model.packs_weights)
        self._watch = watch

    def run(self, x_NH: torch.Tensor, launch: Any, start: int, stop: int) -> Any:
        plain = super().run
        return self._watch.run("layers", start, stop, len(x_NH), lambda: plain(x_NH, launch, start, stop))

    def store(self, x_NH: torch.Tensor, launch: Launch, start: int, stop: int) -> None:
        plain = super().store
        self._watch.run("store", start, stop, len(x_NH), lambda: plain(x_NH, launch, start, stop))

    def features(self, hidden_NH: torch.Tensor, layer: int, launch: Launch | None = None) -> torch.Tensor:
        plain = super().features
        return self._watch.run("head", 0, layer, 0, lambda: plain(hidden_NH, layer, launch))

    def project(self, features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        plain = super().project
        return self._watch.run("head", 0, layer, len(features_NH), lambda: plain(features_NH, layer))


def _watched_measure(measure: "Measure", watch: Stopwatch) -> "Measure":
    def timed(asked: "AskedExit") -> torch.Tensor:
        return watch.run("head", 0, asked.layer, len(asked.hidden_NH), lambda: measure(asked))

    return timed


class Step(NamedTuple):
    """
    Attributes:
        seconds: of all of it; those of `parts` are in them.
        planning: to decide what runs, which is in them too.
        said: tokens.
    """

    seconds: float
    planning: float
    said: int
    parts: list[Part]


@dataclass
class Served:
    """
    Attributes:
        texts, times: of each request: what it said, and when.
        waited: when the last request had its place: from then on there is less and less to do.
    """

    requests: Sequence[Request]
    arrivals: Sequence[float]
    texts: list[list[Emission]]
    times: list[list[float]]
    slots: SlotCounter
    steps: list[Step] = field(default_factory=list)
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def last(self) -> float:
        """When the last token was said, from the first arrival on: with times when nobody was there."""
        return max(times[-1] for times in self.times) - self.arrivals[0]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def depths(self) -> dict[int, int]:
        """Exit layer -> tokens."""
        return dict(sorted(Counter(emission.exit_layer for text in self.texts for emission in text).items()))

    @property
    def parts_seconds(self) -> float:
        return sum(part.seconds for step in self.steps for part in step.parts)

    @property
    def planning_seconds(self) -> float:
        return sum(step.planning for step in self.steps)

    def simulated(self, exits: Sequence[int], *, until: float | None = None) -> list[SimulatedRequest]:
        """Requests with their own depths, for the simulator; up to a time, those that have said anything by then."""
        load = []
        for of, arrival, text, times in zip(self.requests, self.arrivals, self.texts, self.times, strict=True):
            said = [one.exit_layer for one, when in zip(text, times, strict=True) if until is None or when <= until]
            asked = () if of.exit.mode == "full" else tuple(exits)
            if said:
                load.append(SimulatedRequest(len(of.prompt), tuple(said), arrival, asked))
        return load


class RecordedBatch(Batch):
    """
    Attributes:
        watch: of its model.
        slots: how full launches are.
        planning: seconds of the newest plan.
    """

    def __init__(self, model: "OpenedModel", watch: Stopwatch, *, launch_rows: int, **room: Any) -> None:
        super().__init__(model, **room)
        self.watch, self._launch_rows = watch, launch_rows
        self.record_anew()

    def record_anew(self) -> None:
        """It is empty."""
        self.slots, self.planning = SlotCounter(self._launch_rows), 0.0
        self._speaks: set[int] = set()
        self.watch.taken()

    def plan(self, planner: Planner, fronts: Any) -> LaunchPlan:
        started = time.process_time()
        plan = super().plan(planner, fronts)
        self.planning = time.process_time() - started
        return plan

    def launch(self, plan: LaunchPlan) -> Spoken:
        self.slots.count(plan)
        self.watch.prompts = not plan.counts.keys() <= self._speaks
        said = super().launch(plan)
        self._speaks.update(slot for slot, _ in said)
        return said

    def remove(self, slot: int) -> None:
        super().remove(slot)
        self._speaks.discard(slot)


def serve(batch: RecordedBatch, planner: Planner, requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
    """Through an engine of their own.

    Args:
        batch: empty.
        arrivals: ascending.
    """
    batch.record_anew()
    served = Served(requests, arrivals, [[] for _ in requests], [[] for _ in requests], batch.slots)
    engine = Engine(batch, planner)
    now, added = 0.0, 0
    while added < len(requests) or not engine.is_idle:
        if engine.is_idle:
            now = max(now, arrivals[added])
        started = time.process_time()
        while added < len(requests) and arrivals[added] <= now:
            engine.add(requests[added])
            added += 1
        emitted = engine.step()
        seconds = time.process_time() - started
        now += seconds
        served.steps.append(Step(seconds, batch.planning, len(emitted), batch.watch.taken()))
        for number, emission in emitted:
            assert isinstance(emission, Emission), "no request fails"
            served.texts[number].append(emission)
            served.times[number].append(now)
        if not served.waited and added == len(requests) and not engine.num_waiting:
            served.waited = now
    return served
