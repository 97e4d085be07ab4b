"""Steps as they ran: what is recorded, where, and that nothing else changes."""

import json
import logging
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.config import Config
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.pipeline.plan import Fill, Kind, Plan
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.timeline import Span
from megatron_ee.training.observation.trace import Trace, TraceError, make_trace, read_trace, write_trace
from megatron_ee.training.planning import plan_step

WORK = (Kind.F, Kind.X, Kind.B)
VOCAB_SIZE = 320  # of bytes, padded
PARALLEL: dict[str, dict[str, Any]] = {
    "1f1b": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"},
    "filled": {"pipeline": 2, "schedule": "filled-1f1b", "layout": [{"layers": 2}, {"layers": 6}]},
    "data-parallel": {"pipeline": 2, "data": 2},
}
SLOW = ("1f1b", "data-parallel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    write_small_dataset(folder)
    return folder


def _traced_config(folder: Path, name: str, *iterations: int) -> Config:
    exits = {"layers": [1, 2, 5]}
    return run_config(
        folder,
        name=f"{name}-{len(iterations)}",
        parallel=PARALLEL[name],
        exits=exits,
        training={"train_iters": 3, "global_batch_size": 8},
        logging={"interval": 1, "trace_iterations": iterations},
    )


def _plan_of(config: Config) -> Plan:
    data_size = 1 if config.parallel.data == "auto" else config.parallel.data
    return plan_step(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, 8 // data_size)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PARALLEL]
)
def test_a_traced_step_shows_the_whole_plan_and_changes_nothing(folder: Path, ranks: RankPool, name: str) -> None:
    config, plain = _traced_config(folder, name, 2), _traced_config(folder, name)
    world_size = 4 if name == "data-parallel" else 2
    traced, untraced = (ranks.run(world_size, train, run)[0]["figures"] for run in (config, plain))
    losses = [[figures[iteration]["train/loss"] for iteration in (1, 2, 3)] for figures in (traced, untraced)]
    assert losses[0] == losses[1]
    assert not (folder / "runs" / plain.name / "traces").exists()
    (path,) = (folder / "runs" / config.name / "traces").iterdir()
    assert path.name == "step_00000002.json"

    trace, plan = read_trace(path), _plan_of(config)
    assert (trace.iteration, trace.world_size, trace.fills) == (2, world_size, plan.fills)
    assert bool(plan.fills) == (name == "filled")
    for stage, actions in enumerate(plan.actions):
        recorded, planned = trace.recorded[stage], trace.planned[stage]
        assert [span.action for span in recorded] == list(actions)
        work = [span for span in recorded if span.action.kind in WORK]
        assert [span.action for span in planned] == [span.action for span in work]
        for lane in (recorded, planned):
            assert all(earlier.end <= later.start + 1e-12 for earlier, later in pairwise(lane))
            assert all(span.end >= span.start >= 0 for span in lane)
    recorded_s, planned_s = trace.recorded_timeline.makespan, trace.planned_timeline.makespan
    assert recorded_s >= planned_s > 0, "the plan is the same work without delays"
    assert trace.recorded_timeline.busy == pytest.approx(trace.planned_timeline.busy)


def test_viewers_find_a_process_for_each_stage_and_a_lane_for_each_kind_of_action(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "step_00000007.json"
    write_trace(path, _example())
    content = json.loads(path.read_text())
    assert content["otherData"]["megatron_ee"]["schedule"] == "filled-1f1b"
    processes, names = {}, defaultdict(list)
    for event in content["traceEvents"]:
        if event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            names[event["pid"], event["tid"]].append(event["name"])
    assert processes == {1: "stage 0, recorded", 2: "stage 1, recorded", 3: "stage 0, plan", 4: "stage 1, plan"}
    assert names[1, 1] == ["F 0", "F 1", "X 0", "X 1", "B 0", "F 2 fill", "B 1"]
    assert names[1, 2] == [
        *("send forward 0", "send forward 1", "receive backward 0", "send forward 2 fill", "receive backward 1")
    ]
    assert (names[3, 1], (3, 2) in names) == (names[1, 1], False)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, trace = tmp_path / "trace.json", _example()
    write_trace(path, trace)
    assert _rounded(read_trace(path)) == _rounded(trace)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_the_plan_is_the_same_work_without_delays() -> None:
    trace = _example()
    assert trace.recorded_timeline.makespan == pytest.approx(17)
    assert trace.planned_timeline.makespan == pytest.approx(10), "F on the first stage, then nine on the second"
    assert trace.planned[0][0].start == trace.recorded[0][0].start
    assert trace.recorded_timeline.spans[0][0].start == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-200], "is no trace of a training step, or is damaged (JSONDecodeError"),
        (lambda text: "[]", "is no trace of a training step, or is damaged (TypeError"),
        (lambda text: "{}", "is no trace of a training step, or is damaged (KeyError: 'otherData')"),
        (lambda text: text.replace('"version":1', '"version":2'), "is of format version 2; this release reads 1"),
        (lambda text: text.replace('"cat":"F"', '"cat":"G"', 1), "'G' is not a valid Kind"),
        (lambda text: text.replace('"cat":"F"', '"cat":"send_forward"', 1), "stage 0 has not recorded what it planned"),
        (lambda text: text.replace('"pid":1,"tid":1,"ts":0.0', '"pid":9,"tid":1,"ts":0.0'), "9 where a count belongs"),
        (lambda text: text.replace('"dur":', '"dur":-'), "where microseconds belong"),
        (lambda text: text.replace('"microbatch":0', '"microbatch":"0"'), "'0' where a count belongs"),
        (lambda text: text.replace('"kind":"cooldown"', '"kind":"other"'), "a fill of kind 'other'"),
    ],
    ids=["cut", "list", "foreign", "version", "kind", "incomplete", "stage", "duration", "micro-batch", "fill"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Any, said: str) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, _example())
    path.write_text(damage(path.read_text()))
    with pytest.raises(TraceError) as raised:
        read_trace(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.json: No such file"):
        read_trace(tmp_path / "none.json")


def _train_and_listen(config: Config, until: int | None = None) -> tuple[list[str], int]:
    """On each rank: what was warned of, and the iteration that the run began with."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megatron_ee")
    log.addHandler(handler)
    started_at = train(config, until, save=until is not None)["started_at"]
    log.removeHandler(handler)
    return [warning for warning in warnings if "trace" in warning], started_at


def test_a_resumed_run_counts_on(folder: Path, ranks: RankPool) -> None:
    config = _traced_config(folder, "1f1b", 1, 3)
    traces = folder / "runs" / config.name / "traces"
    ranks.run(2, _train_and_listen, config, 1)
    assert [path.name for path in traces.iterdir()] == ["step_00000001.json"]
    assert ranks.run(2, _train_and_listen, config)[0] == ([], 1)
    assert sorted(path.name for path in traces.iterdir()) == ["step_00000001.json", "step_00000003.json"]
    assert read_trace(traces / "step_00000003.json").iteration == 3


def test_a_trace_that_cannot_be_written_is_a_warning(folder: Path, ranks: RankPool) -> None:
    config = _traced_config(folder, "1f1b", 1, 2, 3)
    run = folder / "runs" / config.name
    run.mkdir(parents=True)
    (run / "traces").write_text("in the way")
    (warnings, _), (others, _) = ranks.run(2, _train_and_listen, config)
    assert [warning.partition(": ")[0] for warning in warnings] == [
        f"going on without the trace of iteration {iteration}" for iteration in (1, 2, 3)
    ]
    assert others == []


def _example() -> Trace:
    """A step with a fill; each action begins a while after the one before, so the plan is shorter."""
    plan = build_plan(
        "filled-1f1b", num_stages=2, num_microbatches=2, has_exits=[True] * 2, fills=[Fill("cooldown", 1)]
    )
    recorded = []
    for stage, actions in enumerate(plan.actions):
        spans, now = [], 0.5 * stage
        for action in actions:
            end = now + (1 if action.kind in WORK else 0.2)
            spans.append(Span(action, now, end))
            now = end + 0.5
        recorded.append(spans)
    return make_trace(plan, recorded, iteration=7, world_size=2)


def _rounded(trace: Trace) -> Trace:
    """With times in whole nanoseconds."""
    recorded, planned = (
        tuple(
            tuple(Span(span.action, round(span.start * 1e9), round(span.end * 1e9)) for span in lane) for lane in lanes
        )
        for lanes in (trace.recorded, trace.planned)
    )
    return replace(trace, recorded=recorded, planned=planned)
