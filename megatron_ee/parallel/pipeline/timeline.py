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
    """One step of a pipeline. `spans[stage]` is that stage's work in order; between them the stage idles.

    Attributes:
        num_regular: micro-batches from this number on are fills; None: there are none.
    """

    schedule: str
    spans: tuple[tuple[Span, ...], ...]
    num_regular: int | None = None

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
        """The most micro-batches that each stage holds at once, each from its F to its last piece of work there.

        A fill that a stage runs only forward leaves nothing behind, and isn't counted. One that waits for its W holds
        less than before its B: see `holdings`.
        """
        return tuple(max(map(sum, held), default=0) for held in self.holdings)

    @property
    def holdings(self) -> tuple[frozenset[tuple[int, int]], ...]:
        """What each stage holds at one time or another: micro-batches up to their B, and others that wait for W."""
        return tuple(frozenset(_held(lane)) for lane in self.spans)


def draw(timeline: Timeline, *, width: int = 100) -> str:
    """The timeline as text, one line per stage: `a` is F of micro-batch 0, `A` its B, `+` an X, `*` a W, `.` idle.

    F and B of fills are digits, `0` for the first, instead of letters. The letters repeat after 26 micro-batches, the
    digits after 10; each column shows what the stage does in the middle of its time.

    Args:
        width: characters in a stage's line, its label included.
    """
    labels = [f"{stage:>{len(str(len(timeline.spans) - 1))}} " for stage in range(len(timeline.spans))]
    num_columns = width - len(labels[0])
    if num_columns < 1:
        raise ValueError(f"a width of {width} leaves no room beside the labels")
    makespan, bubble = timeline.makespan, timeline.bubble_fraction
    weights = ", * weights" if _has_weights(timeline) else ""
    legend = f"a forward, A backward{weights}, + exits, . idle" + (", 0-9 fills" if _has_fills(timeline) else "")
    title = f"{timeline.schedule}: makespan {makespan:g}, bubble {bubble:.1%} ({legend})"
    lanes = (_draw_lane(lane, num_columns, makespan, timeline.num_regular) for lane in timeline.spans)
    return "\n".join([title, *(label + lane for label, lane in zip(labels, lanes, strict=True))])


def _held(lane: tuple[Span, ...]) -> Iterator[tuple[int, int]]:
    """The numbers of micro-batches held during each piece of work: up to the end of their B, and from there on."""
    ends = {(span.action.chunk, span.action.microbatch): index for index, span in enumerate(lane)}
    trained = {(span.action.chunk, span.action.microbatch) for span in lane if span.action.kind is Kind.B}
    alive = waiting = 0
    for index, span in enumerate(lane):
        key = (span.action.chunk, span.action.microbatch)
        if trained and key not in trained:
            continue
        alive += span.action.kind is Kind.F
        yield alive, waiting
        if ends[key] == index:
            alive, waiting = (alive, waiting - 1) if span.action.kind is Kind.W else (alive - 1, waiting)
        elif span.action.kind is Kind.B:
            alive, waiting = alive - 1, waiting + 1


def _has_weights(timeline: Timeline) -> bool:
    return any(span.action.kind is Kind.W for lane in timeline.spans for span in lane)


def _has_fills(timeline: Timeline) -> bool:
    first = timeline.num_regular
    return first is not None and any(span.action.microbatch >= first for lane in timeline.spans for span in lane)


def _draw_lane(lane: tuple[Span, ...], num_columns: int, makespan: float, num_regular: int | None) -> str:
    columns = ["."] * num_columns
    for span in lane:
        first, stop = (
            math.ceil(time / makespan * num_columns - 0.5) if makespan else 0 for time in (span.start, span.end)
        )
        columns[first:stop] = _symbol(span.action, num_regular) * (stop - first)
    return "".join(columns)


def _symbol(action: Action, num_regular: int | None) -> str:
    if num_regular is not None and action.microbatch >= num_regular and action.kind in (Kind.F, Kind.B):
        return str((action.microbatch - num_regular) % 10)
    letter = ascii_lowercase[action.microbatch % len(ascii_lowercase)]
    return {Kind.F: letter, Kind.X: "+", Kind.B: letter.upper(), Kind.W: "*"}[action.kind]
