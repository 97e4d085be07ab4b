"""Phases of real runs, and of steps on a clock that is set by hand."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cuda import FakeEvents
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.device.clock import CudaClock, HostClock
from megatron_ee.parallel.pipeline.plan import WORK, Action, Fill, Plan
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import StageCosts, simulate
from megatron_ee.parallel.pipeline.timeline import Timeline
from megatron_ee.training.observation import step_times
from megatron_ee.training.observation.phases import PhaseTimer
from megatron_ee.training.observation.step_times import PlannedBubble, StepTimes

RUNS: dict[str, dict[str, Any]] = {
    "one process": {},
    "two stages": {"parallel": {"pipeline": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}},
    "filled": {"parallel": {"pipeline": 2, "schedule": "filled-1f1b", "layout": [{"layers": 2}, {"layers": 6}]}},
    "zero bubble": {"parallel": {"pipeline": 2, "schedule": "zero-bubble"}},
    "recomputed": {"parallel": {"pipeline": 2}, "training": {"recompute": "full"}},
    "megatron": {"parallel": {"pipeline": 2, "schedule": "megatron"}},
    "two data ranks": {"parallel": {"data": 2, "overlap_grad_reduce": True}},
}
IN_PARTS = {"one process", "two stages"}  # the others hold them, too
AROUND = {"rank_wait", "data", "prepare", "grad_sync", "optimizer"}
ACTIONS = {"forward", "exits", "backward", "p2p_wait"}

SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"has_exits": [True, False, True]},
    "gpipe": {"has_exits": [True, True, True]},
    "zero-bubble": {"has_exits": [False, True, True]},
    "interleaved": {"num_chunks": 2, "has_exits": [True] * 6},
    "filled-1f1b": {"has_exits": [True] * 3, "fills": [Fill("warmup", 1), Fill("cooldown", 1)]},
}
COSTS = StageCosts(forward=(2, 3, 2.5), exit=(1, 0.5, 1), backward=(3, 5, 4), weight=(1.5, 1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timed")
    write_small_dataset(folder)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in IN_PARTS else []) for name in RUNS]
)
def test_phases_of_a_run_sum_to_its_steps(folder: Path, ranks: RankPool, name: str) -> None:
    training = {"train_iters": 4, "global_batch_size": 8, **RUNS[name].get("training", {})}
    config = run_config(
        folder,
        **{"name": name.replace(" ", "-"), **RUNS[name], "training": training, "logging": {"interval": 1}},
    )
    figures = ranks.run(1 if name == "one process" else 2, train, config)[0]["figures"].values()
    expected = AROUND | ({"forward_backward"} if name == "megatron" else ACTIONS)
    expected |= {"weights"} if name == "zero bubble" else set()
    shares = []
    for of_step in list(figures)[1:]:
        phases = {name: value for name, value in of_step.items() if name.startswith("time/")}
        assert phases.keys() == {f"time/{phase}_s" for phase in expected}
        shares.append(sum(phases.values()) / of_step["perf/iter_time_s"])
    assert max(shares) < 1 + 1e-9
    assert statistics.median(shares) > 0.95
    first = next(iter(figures))  # has a simulation; the next has one after a while
    pipeline = {name for name in first if name.startswith("pipeline/")}
    if "pipeline" not in RUNS[name].get("parallel", {}) or name == "megatron":
        assert not pipeline, "one stage has no bubble, and megatron-core's schedules don't show theirs"
    else:
        stages = {f"pipeline/stage_{stage}_busy_s" for stage in (0, 1)}
        assert pipeline == {"pipeline/bubble_fraction", "pipeline/planned_bubble_fraction", *stages}
        assert 0 <= first["pipeline/planned_bubble_fraction"] < first["pipeline/bubble_fraction"] < 1


class HandClock(HostClock):
    """Reads what the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now


class HandMesh:
    """A stage's only rank. A sum over ranks is whole once the main rank, which has to be the last, adds its own."""

    def __init__(self, stage: int, num_stages: int, clock: Any, so_far: list[torch.Tensor]) -> None:
        self.device = SimpleNamespace(clock=lambda: clock, torch=torch.device("cpu"))
        self.rank = self.pipeline_rank = stage
        self.world_size = self.pipeline_size = num_stages
        self.data_size = self.tensor_size = 1
        self.is_main = stage == 0
        self._so_far = so_far

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        total = torch.stack([*self._so_far, values]).sum(0)
        self._so_far[:] = [] if self.is_main else [total]
        return total


def _timer(clock: Any, plan: Plan | None = None) -> PhaseTimer:
    mesh: Any = HandMesh(0, 1, clock, [])
    return PhaseTimer(mesh, plan)


def _run_as_in(timeline: Timeline, actions: Sequence[Action], clock: HandClock, timer: PhaseTimer) -> None:
    """The work at its times; sends and receives end when they begin, and the stage waits between actions."""
    start = clock.now
    spans = iter(timeline.spans[actions[0].stage])
    with timer.pipeline() as (watch,):
        for action in actions:
            span = next(spans) if action.kind in WORK else None
            clock.now = start + span.start if span else clock.now
            watch.begin(action)
            clock.now = start + span.end if span else clock.now
            watch.end(action)


def _times_of(plan: Plan, steps: Sequence[Timeline]) -> StepTimes:
    """What the main rank reads after steps of the whole pipeline."""
    so_far: list[torch.Tensor] = []
    for stage in reversed(range(plan.num_stages)):
        clock = HandClock()
        mesh: Any = HandMesh(stage, plan.num_stages, clock, so_far)
        timer = PhaseTimer(mesh, plan)
        for timeline in steps:
            with timer.step():
                _run_as_in(timeline, plan.actions[stage], clock, timer)
                clock.now += 1
        times = timer.read()
    return times


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_measured_bubble_is_the_simulators(name: str) -> None:
    plan = build_plan(name, num_stages=3, num_microbatches=6, **SCHEDULES[name])
    planned, late = simulate(plan, COSTS), simulate(plan, COSTS, transfer=0.7)
    times = _times_of(plan, [planned, planned])
    assert times.bubble_fraction == pytest.approx(planned.bubble_fraction)
    assert times.busy_s == pytest.approx(planned.busy)
    times = _times_of(plan, [late])
    assert times.bubble_fraction == pytest.approx(late.bubble_fraction)
    assert times.planned_bubble_fraction == pytest.approx(planned.bubble_fraction), "with messages that take no time"
    by_kind = {
        phase: sum(COSTS(action) for actions in plan.actions for action in actions if action.kind is kind) / 3
        for kind, phase in step_times.PHASE_OF.items()
    }
    assert {phase: times.phases_s.get(phase, 0) for phase in by_kind} == pytest.approx(by_kind)
    figures = times.figures()
    assert figures["pipeline/stage_1_busy_s"] == pytest.approx(planned.busy[1])
    assert figures["pipeline/planned_bubble_fraction"] < figures["pipeline/bubble_fraction"]


def test_durations_are_means_over_steps() -> None:
    plan = build_plan("1f1b", num_stages=3, num_microbatches=4, has_exits=[True] * 3)
    slow = StageCosts(forward=(4, 3, 2.5), exit=(3, 0.5, 1), backward=(3, 5, 10))
    mean = StageCosts(forward=(3, 3, 2.5), exit=(2, 0.5, 1), backward=(3, 5, 7))
    times = _times_of(plan, [simulate(plan, COSTS), simulate(plan, slow)])
    assert times.planned_bubble_fraction == pytest.approx(simulate(plan, mean).bubble_fraction)
    assert times.busy_s == pytest.approx(simulate(plan, mean).busy)


def test_figures_are_means_per_step_and_a_checkpoint_stands_for_itself() -> None:
    """Two steps of 3 s, with 1 s of data each; a checkpoint of 5 s, and 1 s until all have it; two more steps with a
    wait of 2 s between."""
    clock = HandClock()
    timer = _timer(clock)

    def step() -> None:
        with timer.step():
            with timer.phase("data"):
                clock.now += 1
            with timer.pipeline() as watches:
                assert not watches, "no plan, nothing to watch"
                clock.now += 1.75
            clock.now += 0.25

    with timer.rank_wait():
        clock.now += 100
    step()
    step()
    times = timer.read()
    assert times.step_s == 3, "ranks that are built later than this one don't count"
    assert times.figures() == {"time/data_s": 1, "time/forward_backward_s": 1.75}
    with timer.phase("checkpoint"):
        clock.now += 5
    with timer.rank_wait():
        clock.now += 1
    step()
    with timer.rank_wait():
        clock.now += 2
    step()
    times = timer.read()
    assert times.step_s == 4
    assert times.figures() == {
        "time/rank_wait_s": 1,
        "time/data_s": 1,
        "time/forward_backward_s": 1.75,
        "time/checkpoint_s": 6,
    }


def test_parts_of_a_step_on_their_own_count_for_nothing() -> None:
    clock = HandClock()
    plan = build_plan("1f1b", num_stages=1, num_microbatches=1, has_exits=[True])
    timer = _timer(clock, plan)
    with timer.phase("data"), timer.pipeline() as watches:
        clock.now += 1
    assert not watches
    with timer.step():
        _run_as_in(simulate(plan, COSTS), plan.actions[0], clock, timer)
    assert timer.read().phases_s == {"forward": 2, "exits": 1, "backward": 3}


def test_on_a_gpu_nothing_is_waited_for_and_events_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    events = FakeEvents(monkeypatch)
    plan = build_plan("1f1b", num_stages=1, num_microbatches=4, has_exits=[True])
    timer = _timer(CudaClock(), plan)

    def step(reached: Callable[[], float]) -> None:
        with timer.step():
            with timer.pipeline() as (watch,):
                for action in plan.actions[0]:
                    watch.begin(action)
                    events.now += 1
                    watch.end(action)
            events.reached = reached()
            events.now += 1

    for _ in range(20):
        step(lambda: events.now)  # the optimizer waits for the gradients' norm; the update is still to come
    assert events.num_waits == 0
    most = 2 * (4 + 2 * len(plan.actions[0]))
    assert events.num_made <= most
    assert timer.read().phases_s == pytest.approx({"forward": 4, "exits": 4, "backward": 4})
    assert events.num_waits == 1, "for the last step"
    for _ in range(20):
        step(lambda: events.reached)  # an optimizer that waits for nothing
    assert events.num_waits == 1 + 18
    assert events.num_made <= 2 * most


def test_a_simulation_takes_half_a_percent_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan("1f1b", num_stages=2, num_microbatches=2, has_exits=[True] * 2)
    even, uneven = [[1.0] * 12] * 2, [[1.0] * 12, [2.0] * 12]
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.0])  # simulations take one second, and two
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    bubble = PlannedBubble(plan)
    first = bubble.fraction(even, elapsed_s=1)
    assert first == pytest.approx(simulate(plan, lambda action: 1.0).bubble_fraction)
    assert bubble.fraction(uneven, elapsed_s=150) is None
    assert bubble.fraction(uneven, elapsed_s=50) == pytest.approx(
        simulate(plan, lambda action: 1.0 + action.stage).bubble_fraction
    )
    assert bubble.fraction(even, elapsed_s=399) is None
    assert bubble.fraction(even, elapsed_s=1) == first
