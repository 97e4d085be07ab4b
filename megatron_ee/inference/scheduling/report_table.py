"""Reports side by side, as an aligned table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron_ee.inference.scheduling.report import Percentiles, Report

_WIDTH = 18
_NAME = 30


class Unit(NamedTuple):
    """
    Attributes:
        name: of the times that are shown.
        factor: from the reports' times.
    """

    name: str
    factor: float = 1.0


MILLISECONDS = Unit("ms", 1e3)


def table(
    reports: Mapping[str, Report], *, unit: Unit = MILLISECONDS, bound: float | None = None, rate: str = "tokens/s"
) -> list[str]:
    """Lines: a column for each report, with its ratio to the first one, which is lockstep.

    Args:
        bound: tokens a second that no strategy can exceed.
        rate: what throughput is called.
    """
    columns = list(reports.values())
    lines = [f"{'':{_NAME}}" + "".join(f"{name:>{_WIDTH}}" for name in reports)]
    lines.append(_row(rate, columns, lambda of: of.tokens_per_second))
    if bound:
        shares = [f"{of.tokens_per_second / bound:.1%}" for of in columns]
        lines.append(_line(f"of the bound, {bound:,.4g}", shares))
    for title, of in _WAITS.items():
        for index, name in enumerate(Percentiles._fields):
            value = _scaled(of, index, unit.factor)
            lines.append(_row(f"{title} {name} ({unit.name})" if index == 0 else f"{'':4}{name}", columns, value))
    lines.append(_line("forced exits", [str(of.forced) for of in columns]))
    return [*lines, *_slot_lines(columns), *_stage_lines(columns)]


_WAITS: Mapping[str, Callable[[Report], Percentiles]] = {
    "first token": lambda of: of.first_token,
    "each token": lambda of: of.token,
    "request": lambda of: of.request,
}


def _slot_lines(columns: Sequence[Report]) -> Iterator[str]:
    for start, stop in sorted({segment for of in columns for segment in of.use}):
        uses = [of.use.get((start, stop)) for of in columns]
        launches = ["-" if use is None else f"{use.launches} x {use.rows_a_launch:.1f}" for use in uses]
        yield _line(f"layers {start + 1} to {stop}: launches", launches)
        shares = ["-" if use is None else " ".join(f"{share:4.0%}" for share in use.shares) for use in uses]
        yield _line("    slots: real filled empty", shares)
        if any(use is not None and use.catch_ups for use in uses):
            yield _line("    to catch up", ["-" if use is None else f"{use.catch_ups}" for use in uses])


def _stage_lines(columns: Sequence[Report]) -> Iterator[str]:
    for stage in range(max((len(of.stages) for of in columns), default=0)):
        shares = [" ".join(f"{share:4.0%}" for share in of.stages[stage].shares) for of in columns]
        yield _line(f"stage {stage}: real filled idle", shares)


def _scaled(of: Callable[[Report], Percentiles], index: int, factor: float) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        seconds = of(report)[index]
        return None if seconds is None else seconds * factor

    return value


def _row(name: str, columns: Sequence[Report], of: Callable[[Report], float | None]) -> str:
    values = [of(column) for column in columns]
    first = values[0]
    cells = []
    for number, value in enumerate(values):
        if value is None:
            cells.append("-")
        elif number == 0 or not first:
            cells.append(f"{value:,.4g}{'':7}")
        else:
            cells.append(f"{value:,.4g} {value / first:5.2f}x")
    return _line(name, cells)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)
