"""What the stages of a decoding pipeline did, launch by launch: noted as it runs, or as it is simulated, and kept in a
file. Imports no torch.

There are two clocks. The virtual one, which every process follows, says when launches of all stages begin and end, by
estimated costs. The other one is real, and of this process alone: it is read around a launch whose layers are here.
Stages in other processes have no such times, so that nothing has to be sent for a record.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ee.errors import UserError
from megatron_ee.inference.json_files import write_json
from megatron_ee.inference.scheduling.fronts import LaunchPlan

VERSION = 1  # of the file

Times = tuple[float, float]
"""Begin and end."""
Clock = Literal["virtual", "seconds"]


class RecordError(UserError):
    """A file is no record of decoding, or a damaged one."""


@dataclass(frozen=True, slots=True)
class RecordedLaunch:
    """
    Attributes:
        stage: that ran it.
        start, stop: it ran layers `start + 1` to `stop`.
        tokens: sequences that it was for.
        rows: of these, with those of earlier tokens that they took along.
        filled: rows that ran along, or alone, because there was room.
        virtual: by the clock of estimated costs.
        seconds: of its computing, from the beginning of the record; None: that was in another process.
    """

    stage: int
    start: int
    stop: int
    tokens: int
    rows: int
    filled: int
    virtual: Times
    seconds: Times | None = None


@dataclass(frozen=True, slots=True)
class DecodingRecord:
    """
    Attributes:
        stops: the layer that each stage ends with.
        launches: in the order in which they began.
    """

    stops: tuple[int, ...]
    launches: tuple[RecordedLaunch, ...]

    def has(self, clock: Clock) -> bool:
        """Whether it knows all times by a clock."""
        return clock == "virtual" or all(of.seconds is not None for of in self.launches)

    def lanes(self, clock: Clock) -> list[list[tuple[RecordedLaunch, Times]]]:
        """Of each stage, its launches with their times; by the real clock those that have some."""
        lanes: list[list[tuple[RecordedLaunch, Times]]] = [[] for _ in self.stops]
        for of in self.launches:
            times = of.virtual if clock == "virtual" else of.seconds
            if times is not None:
                lanes[of.stage].append((of, times))
        return lanes


class Recorder:
    """Notes launches as they begin.

    Attributes:
        stops: of the pipeline that it notes; None: there has been none.
    """

    def __init__(self) -> None:
        self.stops: tuple[int, ...] | None = None
        self._launches: list[RecordedLaunch] = []
        self._offset = 0.0

    def begin(self, stops: Sequence[int]) -> None:
        """A pipeline begins, its virtual clock at 0; one that begins later goes on where all before has ended."""
        assert self.stops in (None, tuple(stops)), "a record is of one layout"
        self.stops = tuple(stops)
        self._offset = max((of.virtual[1] for of in self._launches), default=0.0)

    def note(self, stage: int, plan: LaunchPlan, virtual: Times, seconds: Times | None) -> None:
        begin, end = virtual
        self._launches.append(
            RecordedLaunch(
                stage,
                plan.start,
                plan.stop,
                len(plan.counts),
                sum(plan.counts.values()),
                sum(plan.fills.values()),
                (self._offset + begin, self._offset + end),
                seconds,
            )
        )

    @property
    def record(self) -> DecodingRecord:
        """Its seconds begin with the first launch that has some."""
        first = min((of.seconds[0] for of in self._launches if of.seconds is not None), default=0.0)
        return DecodingRecord(self.stops or (), tuple(_shifted(of, first) for of in self._launches))


def write_record(path: Path, record: DecodingRecord) -> None:
    """As JSON, so that the file is whole or as it was.

    Raises:
        UserError: it cannot be written.
    """
    launches = [
        {
            "stage": of.stage,
            "layers": [of.start, of.stop],
            "tokens": of.tokens,
            "rows": of.rows,
            "filled": of.filled,
            "virtual": of.virtual,
            "seconds": of.seconds,
        }
        for of in record.launches
    ]
    content = {"version": VERSION, "stops": record.stops, "launches": launches}
    write_json(path, content, indent=None)


def read_record(path: Path) -> DecodingRecord:
    """What `write_record` wrote.

    Raises:
        RecordError: there is no such file, it is something else, or a field of it is wrong, which is named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as JSON: {error}") from error
    fields = content if isinstance(content, dict) else {}
    if fields.get("version") != VERSION:
        raise RecordError(f"{path}: version: {fields.get('version')!r}; this release reads {VERSION}")
    try:
        _check_names(fields, {"version", "stops", "launches"}, "the record")
        stops = tuple(_whole(stop, 1, "stops") for stop in _list(fields["stops"], "stops"))
        if not stops or list(stops) != sorted(set(stops)):
            raise ValueError(f"stops: {list(stops)} do not ascend, or there are none")
        launches = tuple(_launches(_list(fields["launches"], "launches"), stops))
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from error
    return DecodingRecord(stops, launches)


def _launches(values: Sequence[Any], stops: tuple[int, ...]) -> Iterator[RecordedLaunch]:
    names = {"stage", "layers", "tokens", "rows", "filled", "virtual", "seconds"}
    free_at: dict[tuple[int, str], float] = {}
    for number, value in enumerate(values):
        where = f"launches[{number}]"
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {value!r} is no launch")
        _check_names(value, names, where)
        launch = _launch(value, stops, where)
        for clock, times in (("virtual", launch.virtual), ("seconds", launch.seconds)):
            if times is None:
                continue
            if times[0] < free_at.get((launch.stage, clock), 0.0):
                raise ValueError(f"{where}.{clock}: begins before the one before it on stage {launch.stage} has ended")
            free_at[launch.stage, clock] = times[1]
        yield launch


def _launch(value: Mapping[str, Any], stops: tuple[int, ...], where: str) -> RecordedLaunch:
    stage = _whole(value["stage"], 0, f"{where}.stage")
    if stage >= len(stops):
        raise ValueError(f"{where}.stage: there is no stage {stage}, only {len(stops)}")
    layers = _list(value["layers"], f"{where}.layers", 2)
    start, stop = (_whole(layer, 0, f"{where}.layers") for layer in layers)
    if not (stops[stage - 1] if stage else 0) <= start < stop <= stops[stage]:
        raise ValueError(f"{where}.layers: {layers} are not of stage {stage}")
    tokens, rows, filled = (_whole(value[name], 0, f"{where}.{name}") for name in ("tokens", "rows", "filled"))
    if tokens > rows or rows + filled == 0:
        raise ValueError(f"{where}.rows: {tokens} tokens cannot have {rows} rows, with {filled} filled")
    seconds = None if value["seconds"] is None else _times(value["seconds"], f"{where}.seconds")
    virtual = _times(value["virtual"], f"{where}.virtual")
    return RecordedLaunch(stage, start, stop, tokens, rows, filled, virtual, seconds)


def _check_names(fields: Mapping[str, Any], names: set[str], where: str) -> None:
    if wrong := sorted(fields.keys() ^ names):
        raise ValueError(f"{where}: {wrong[0]} is {'unknown' if wrong[0] in fields else 'missing'}")


def _list(value: Any, where: str, size: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (size is not None and len(value) != size):
        raise ValueError(f"{where}: {value!r} is no list" + (f" of {size}" if size is not None else ""))
    return value


def _whole(value: Any, least: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{where}: {value!r} is no whole number of {least} or more")
    return value


def _times(value: Any, where: str) -> Times:
    begin, end = _list(value, where, 2)
    for time in (begin, end):
        if not isinstance(time, int | float) or isinstance(time, bool) or not math.isfinite(time):
            raise ValueError(f"{where}: {time!r} is no time")
    if not 0 <= begin <= end:
        raise ValueError(f"{where}: {value!r} does not end after it begins")
    return float(begin), float(end)


def _shifted(of: RecordedLaunch, first: float) -> RecordedLaunch:
    if of.seconds is None:
        return of
    seconds = (of.seconds[0] - first, of.seconds[1] - first)
    return RecordedLaunch(of.stage, of.start, of.stop, of.tokens, of.rows, of.filled, of.virtual, seconds)
