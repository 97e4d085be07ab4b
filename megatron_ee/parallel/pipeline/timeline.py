"""When each stage does what: the result of simulating a plan, and its drawing as text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_lowercase

from megatron_ee.parallel.pipeline.plan import Action, Kind


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work and its time on the stage's clock."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step of a pipeline. `spans[stage]` is that stage's F, X and B in order; between them the stage idles."""

    schedule: str
    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Time from the start to the end of the last piece of work on any stage."""
        return max((span.end for lane in self.spans for span in lane), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time at work of each stage."""
        return tuple(sum(span.end - span.start for span in lane) for lane in self.spans)

    @property
    def bubble_fraction(self) -> float:
        """Share of stages x makespan that is idle, in [0, 1)."""
        available = len(self.spans) * self.makespan
        return 1 - sum(self.busy) / available if available else 0.0

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """The most micro-batches that each stage holds at once, each from its F to its last piece of work there."""
        return tuple(max(_alive(lane), default=0) for lane in self.spans)


def draw(timeline: Timeline, *, width: int = 100) -> str:
    """The timeline as text, one line per stage: `a` is F of micro-batch 0, `A` its B, `+` an X, `.` idle.

    The letters repeat after 26 micro-batches; each column shows what the stage does in the middle of its time.

    Args:
        width: characters in a stage's line, its label included.
    """
    labels = [f"{stage:>{len(str(len(timeline.spans) - 1))}} " for stage in range(len(timeline.spans))]
    num_columns = width - len(labels[0])
    if num_columns < 1:
        raise ValueError(f"a width of {width} leaves no room beside the labels")
    makespan, bubble = timeline.makespan, timeline.bubble_fraction
    title = f"{timeline.schedule}: makespan {makespan:g}, bubble {bubble:.1%} (a forward, A backward, + exits, . idle)"
    lanes = (_draw_lane(lane, num_columns, makespan) for lane in timeline.spans)
    return "\n".join([title, *(label + lane for label, lane in zip(labels, lanes, strict=True))])


def _alive(lane: tuple[Span, ...]) -> Iterator[int]:
    """The number of micro-batches held during each piece of work."""
    ends = {(span.action.chunk, span.action.microbatch): index for index, span in enumerate(lane)}
    alive = 0
    for index, span in enumerate(lane):
        alive += span.action.kind is Kind.F
        yield alive
        alive -= ends[span.action.chunk, span.action.microbatch] == index


def _draw_lane(lane: tuple[Span, ...], num_columns: int, makespan: float) -> str:
    columns = ["."] * num_columns
    for span in lane:
        first, stop = (
            math.ceil(time / makespan * num_columns - 0.5) if makespan else 0 for time in (span.start, span.end)
        )
        columns[first:stop] = _symbol(span.action) * (stop - first)
    return "".join(columns)


def _symbol(action: Action) -> str:
    letter = ascii_lowercase[action.microbatch % len(ascii_lowercase)]
    return {Kind.F: letter, Kind.X: "+", Kind.B: letter.upper()}[action.kind]
