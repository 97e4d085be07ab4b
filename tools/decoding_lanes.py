"""What the stages of a decoding pipeline did, as text: a lane for each, and the shares of its time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ee.errors import UserError
from megatron_ee.inference.decoding_record import Clock, DecodingRecord, RecordedLaunch, Times

UNITS: dict[Clock, str] = {"virtual": "estimated cost", "seconds": "s"}
REAL, MIXED, FILLED, IDLE = "#+o."


@dataclass(frozen=True, slots=True)
class Lane:
    """A stage within a window of time.

    Attributes:
        launches: that touch the window, with their times in it.
        real, filled: shares of the window: of launches with tokens on their way, and of those with nothing but filled
            rows.
    """

    launches: Sequence[tuple[RecordedLaunch, Times]]
    real: float
    filled: float

    @property
    def idle(self) -> float:
        return max(0.0, 1 - self.real - self.filled)


def lanes_of(record: DecodingRecord, clock: Clock, window: Times | None) -> tuple[Times, list[Lane]]:
    """Of all stages, and the window itself; by default all the time that was recorded.

    Raises:
        UserError: nothing was recorded then, or by that clock.
    """
    lanes = record.lanes(clock)
    times = [times for lane in lanes for _, times in lane]
    if not times:
        raise UserError(f"the record has no launch by the {clock} clock")
    begin, end = window or (min(times)[0], max(end for _, end in times))
    if not any(begin < last and first < end for first, last in times):
        whole = f"{min(times)[0]:g} to {max(end for _, end in times):g}"
        raise UserError(f"--window: nothing was recorded from {begin:g} to {end:g}, only from {whole}")
    return (begin, end), [_lane(lane, begin, end) for lane in lanes]


def lines_of(record: DecodingRecord, clock: Clock, window: Times | None, *, width: int) -> Iterator[str]:
    """Lanes, and a table of stages.

    Raises:
        UserError: see `lanes_of`.
    """
    (begin, end), lanes = lanes_of(record, clock, window)
    legend = f"{REAL} tokens, {MIXED} with filled rows, {FILLED} filled rows alone, {IDLE} idle"
    yield f"{len(lanes)} stages, from {begin:g} to {end:g} ({UNITS[clock]}): {legend}"
    label = len(str(len(lanes) - 1)) + 1
    for stage, lane in enumerate(lanes):
        yield f"{stage:>{label - 1}} " + _draw(lane, begin, end, max(1, width - label))
    yield ""
    shares = "".join(f"{name:>8}" for name in ("real", "filled", "idle"))
    yield f"{'stage':<7}{'layers':>10}{shares}{'launches':>10}{'tokens':>9}{'rows':>9}{'filled rows':>13}"
    for stage, lane in enumerate(lanes):
        shares = "".join(f"{share:>8.1%}" for share in (lane.real, lane.filled, lane.idle))
        launches = [launch for launch, _ in lane.launches]
        counts = [sum(getattr(of, name) for of in launches) for name in ("tokens", "rows", "filled")]
        layers = f"{(0, *record.stops)[stage] + 1}-{record.stops[stage]}"
        yield f"{stage:<7}{layers:>10}{shares}{len(launches):>10}{counts[0]:>9}{counts[1]:>9}{counts[2]:>13}"


def _lane(launches: Sequence[tuple[RecordedLaunch, Times]], begin: float, end: float) -> Lane:
    inside = [
        (launch, (max(begin, first), min(end, last)))
        for launch, (first, last) in launches
        if begin < last and first < end
    ]
    times = [0.0, 0.0]
    for launch, (first, last) in inside:
        times[launch.tokens == 0] += last - first
    return Lane(inside, times[0] / (end - begin), times[1] / (end - begin))


def _draw(lane: Lane, begin: float, end: float, num_columns: int) -> str:
    """Each column shows what the stage does in the middle of its time."""
    columns = [IDLE] * num_columns
    for launch, times in lane.launches:
        first, stop = (math.ceil((time - begin) / (end - begin) * num_columns - 0.5) for time in times)
        symbol = FILLED if not launch.tokens else MIXED if launch.filled else REAL
        columns[first:stop] = symbol * (stop - first)
    return "".join(columns)
