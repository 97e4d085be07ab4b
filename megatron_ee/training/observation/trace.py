"""A training step as it ran, beside its plan: RUN/traces/step_00000003.json, which ui.perfetto.dev and chrome://tracing
open.

The file is in Chrome's trace event format, with times in microseconds from a start that all stages share (see
`tracer`). One pipeline is in it: that of data-parallel rank 0, with tensor-parallel rank 0 of each stage. Its stages
are processes 1 to P, with two lanes each: the work, F, X and B of a micro-batch as "F 3" ("F 3.1" on a stage's second
chunk, "F 8 fill" for a fill), and the messages, of which a receive lasts as long as the stage waited for it. Processes
P + 1 to 2 P are the plan: the same work, simulated with its recorded durations, and messages that take no time.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from megatron_ee.errors import UserError
from megatron_ee.parallel.pipeline.plan import WORK, Action, Fill, Kind, Plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.pipeline.timeline import Span, Timeline

VERSION = 1  # of the file
KEY = "megatron_ee"  # within otherData

_LANES = ("work", "messages")
_NS = 1e-9  # all times are whole nanoseconds, so that neighbours still touch when they have been written and read

Lanes = tuple[tuple[Span, ...], ...]
"""Each stage's spans in order, in seconds."""


class TraceError(UserError):
    """A file is no trace, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One step of one pipeline.

    Attributes:
        iteration: counted from 1.
        world_size: processes of the run.
        num_regular: micro-batches of the pipeline, without `fills`, which are numbered after them.
        recorded: all actions of each stage, with sends and waits for messages; from the start that stages share.
        planned: F, X and B of the plan with the recorded durations; it starts when the first stage did.
    """

    iteration: int
    world_size: int
    schedule: str
    num_chunks: int
    num_regular: int
    fills: tuple[Fill, ...]
    recorded: Lanes
    planned: Lanes

    @property
    def recorded_timeline(self) -> Timeline:
        """F, X and B as they ran, in seconds from the first of them."""
        return self._timeline(tuple(tuple(_work_of(lane)) for lane in self.recorded))

    @property
    def planned_timeline(self) -> Timeline:
        """The same as planned."""
        return self._timeline(self.planned)

    def _timeline(self, lanes: Lanes) -> Timeline:
        start = _start_of(lanes)
        shifted = tuple(
            tuple(Span(span.action, span.start - start, span.end - start) for span in lane) for lane in lanes
        )
        return Timeline(self.schedule, shifted, self.num_regular)


def make_trace(plan: Plan, recorded: Sequence[Sequence[Span]], *, iteration: int, world_size: int) -> Trace:
    """A step's trace from what its stages recorded.

    Args:
        recorded: the spans of `plan.actions`, in seconds from a start that the stages share.
    """
    lanes = tuple(tuple(_whole_ns(span) for span in lane) for lane in recorded)
    durations = {span.action: span.end - span.start for lane in lanes for span in lane}
    start = _start_of(tuple(tuple(_work_of(lane)) for lane in lanes))
    planned = tuple(
        tuple(_whole_ns(Span(span.action, start + span.start, start + span.end)) for span in lane)
        for lane in simulate(plan, durations.__getitem__).spans
    )
    return Trace(iteration, world_size, plan.schedule, plan.num_chunks, plan.num_regular, plan.fills, lanes, planned)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace so that the file is whole or absent.

    Raises:
        OSError: it cannot be written.
    """
    content = {"displayTimeUnit": "ms", "otherData": {KEY: _head_of(trace)}, "traceEvents": [*_events_of(trace)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(content, separators=(",", ":")) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_trace(path: Path) -> Trace:
    """What `write_trace` wrote.

    Raises:
        TraceError: there is no such file, it is something else, or it is damaged.
    """
    try:
        content = json.loads(path.read_text())
        head = content["otherData"][KEY]
        if head["version"] != VERSION:
            raise TraceError(f"{path}: is of format version {head['version']}; this release reads {VERSION}")
        trace = _trace_from(head, content["traceEvents"])
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except TraceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TraceError(f"{path}: is no trace of a training step, or is damaged ({reason})") from error
    return trace


def _head_of(trace: Trace) -> dict[str, Any]:
    """What the events don't say."""
    return {
        "version": VERSION,
        "iteration": trace.iteration,
        "world_size": trace.world_size,
        "schedule": trace.schedule,
        "num_stages": len(trace.recorded),
        "num_idle": sum(not lane for lane in trace.planned),
        "num_chunks": trace.num_chunks,
        "num_regular": trace.num_regular,
        "fills": [asdict(fill) for fill in trace.fills],
    }


def _events_of(trace: Trace) -> Iterator[dict[str, Any]]:
    num_stages = len(trace.recorded)
    for stage in range(num_stages):
        yield from _names(1 + stage, f"stage {stage}, recorded", _LANES)
        yield from _names(1 + num_stages + stage, f"stage {stage}, plan", _LANES[:1])
    for lanes, first_process in ((trace.recorded, 1), (trace.planned, 1 + num_stages)):
        for process, lane in enumerate(lanes, start=first_process):
            for span in lane:
                yield _event(trace, span, process)


def _names(process: int, name: str, lanes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What viewers call a process and its lanes, and in which order they show them."""
    about = {"ph": "M", "pid": process}
    yield {**about, "name": "process_name", "args": {"name": name}}
    yield {**about, "name": "process_sort_index", "args": {"sort_index": process}}
    for thread, lane in enumerate(lanes, start=1):
        yield {**about, "name": "thread_name", "tid": thread, "args": {"name": lane}}
        yield {**about, "name": "thread_sort_index", "tid": thread, "args": {"sort_index": thread}}


def _event(trace: Trace, span: Span, process: int) -> dict[str, Any]:
    action = span.action
    is_fill = action.microbatch >= trace.num_regular
    name = str(action.kind).replace("recv", "receive").replace("_", " ")
    chunk = f".{action.chunk}" if action.chunk else ""
    start, end = _to_ns(span.start), _to_ns(span.end)
    return {
        "ph": "X",
        "name": f"{name} {action.microbatch}{chunk}{' fill' if is_fill else ''}",
        "cat": str(action.kind),
        "pid": process,
        "tid": 1 if action.kind in WORK else 2,
        "ts": start / 1000,
        "dur": (end - start) / 1000,
        "args": {
            "chunk": action.chunk,
            "microbatch": action.microbatch,
            **({"fill": trace.fills[action.microbatch - trace.num_regular].kind} if is_fill else {}),
        },
    }


def _trace_from(head: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Trace:
    num_stages, num_chunks, num_regular = (_count(head[f"num_{name}"], 1) for name in ("stages", "chunks", "regular"))
    num_working = num_stages - _count(head.get("num_idle", 0), 0, num_stages - 1)
    fills = tuple(_fill(fill, num_stages) for fill in head["fills"])
    lanes: list[list[Span]] = [[] for _ in range(2 * num_stages)]
    for event in events:
        if event["ph"] != "X":
            continue
        place = _count(event["pid"], 1, 2 * num_stages) - 1
        chunk = _count(event["args"]["chunk"], 0, num_chunks - 1)
        microbatch = _count(event["args"]["microbatch"], 0, num_regular + len(fills) - 1)
        action = Action(Kind(event["cat"]), place % num_stages, chunk, microbatch)
        start, duration = (round(_microseconds(event[key]) * 1000) for key in ("ts", "dur"))
        lanes[place].append(Span(action, start * _NS, (start + duration) * _NS))
    recorded, planned = (tuple(map(tuple, half)) for half in (lanes[:num_stages], lanes[num_stages:]))
    for stage, (own, plan) in enumerate(zip(recorded, planned, strict=True)):
        if bool(plan) != (stage < num_working) or [span.action for span in _work_of(own)] != [
            span.action for span in plan
        ]:
            raise ValueError(f"stage {stage} has not recorded what it planned")
    iteration, world_size, schedule = _count(head["iteration"], 1), _count(head["world_size"], 1), str(head["schedule"])
    trace = Trace(iteration, world_size, schedule, num_chunks, num_regular, fills, recorded, planned)
    if min(trace.recorded_timeline.makespan, trace.planned_timeline.makespan) == 0:
        raise ValueError("nothing took any time")
    return trace


def _fill(value: Mapping[str, Any], num_stages: int) -> Fill:
    if value["kind"] not in ("warmup", "cooldown"):
        raise ValueError(f"a fill of kind {value['kind']!r}")
    kind = cast(Literal["warmup", "cooldown"], value["kind"])
    return Fill(kind, _count(value["stage"], 0, num_stages - 1))


def _count(value: Any, least: int, most: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{value!r} where a count belongs")
    return value


def _microseconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} where microseconds belong")
    return float(value)


def _work_of(lane: Sequence[Span]) -> Iterator[Span]:
    return (span for span in lane if span.action.kind in WORK)


def _start_of(lanes: Lanes) -> float:
    return min(span.start for lane in lanes for span in lane)


def _whole_ns(span: Span) -> Span:
    return Span(span.action, _to_ns(span.start) * _NS, _to_ns(span.end) * _NS)


def _to_ns(seconds: float) -> int:
    return round(seconds / _NS)
