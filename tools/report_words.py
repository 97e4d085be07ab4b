"""How a report says figures: counts, sizes, durations, and names of what a run is."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def rounded(value: Any) -> str:
    """Four digits that count; text, and whole numbers, as they are."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "-" if value is None else f"{value:,}" if type(value) is int else str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def size(num_bytes: float) -> str:
    """As in `12.5 MiB`."""
    place = min(len(_UNITS) - 1, int(math.log2(num_bytes) // 10)) if num_bytes >= 1 else 0
    return f"{num_bytes / 2 ** (10 * place):.{1 if place else 0}f} {_UNITS[place]}"


def duration(seconds: float) -> str:
    """As in `2 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60
    if hours:
        return f"{hours:,} h {minutes % 60:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def large(number: float) -> str:
    """As in `2.1 million`."""
    for least, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= least:
            return f"{number / least:.3g} {name}"
    return f"{number:,.0f}"


def moment(text: Any) -> datetime | None:
    """A time as a run's files have it; None: it is none."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return None


def told(text: Any) -> str:
    """Such a time for people, as it was where the run was; anything else as it is."""
    at = moment(text)
    return f"{at:%Y-%m-%d %H:%M:%S %z}" if at else str(text or "-")


def each_or_one(values: Any) -> str:
    """A setting that is one for all exits, or a list: those that are alike are said once."""
    distinct = set(values) if isinstance(values, tuple | list) else {values}
    return str(distinct.pop()) if len(distinct) == 1 else ", ".join(map(str, values))


def fault(about: Mapping[str, Any]) -> str:
    """What a machine found wrong with its ranks, in a line."""
    if about.get("fault") == "elsewhere":
        return f"another machine found it ({about.get('detail')})"
    place = f", stage {about['stage']}" if about.get("stage") is not None else ""
    rank = f"rank {about['rank']} on {about.get('host')}{place} " if about.get("rank") is not None else ""
    iteration = f" in iteration {about['iteration']}" if about.get("iteration") is not None else ""
    action = f", at {about['action']}" if about.get("action") else ""
    return f"{rank}{about.get('fault')}{iteration}{action}" + (f": {about['detail']}" if about.get("detail") else "")
