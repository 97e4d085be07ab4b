"""What other tools measured of a run, as their json files say it: sweeps, measures, serving, depths, benches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from html_page import HtmlPage, Value
from report_run import ReportError, read_json
from report_words import rounded, share


class Table(NamedTuple):
    """As `HtmlPage.table` takes it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    caption: str = ""


class Goal(NamedTuple):
    """A measure over its goal, turned so that above 1 is better: the median of its rounds, p10 and p90."""

    measure: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One file.

    Attributes:
        kind: bench, depths, or what else was measured.
        said: sentences before the tables.
        tokens: of depths: number of layers run -> tokens that came out there.
        goals: of a bench: measures that are held against one.
    """

    path: Path
    kind: str
    tables: Sequence[Table] = ()
    said: Sequence[str] = ()
    tokens: Mapping[int, int] | None = None
    goals: Sequence[Goal] = ()


def find_measured(folder: Path) -> Iterator[Measured]:
    """All that a run's folder holds, in the order of names; of other json files, kind is "unknown".

    Raises:
        ReportError: a file cannot be read, or is damaged.
    """
    found = [path for place in (".", "pictures", "bench") for path in sorted((folder / place).glob("*.json"))]
    return (read_measured(path) for path in found if path.name != "heartbeat.json")


def read_measured(path: Path, *, kind: str | None = None) -> Measured:
    """
    Args:
        kind: that it has to be of; None: any.

    Raises:
        ReportError: the file cannot be read, is damaged, or of another kind.
    """
    content = read_json(path)
    found = next((name for name, (is_one, _) in _KINDS.items() if is_one(content)), "unknown")
    if kind not in (None, found):
        raise ReportError(f"{path}: not a file of {kind}")
    if found == "unknown":
        return Measured(path, found)
    try:
        return _KINDS[found][1](path, content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ReportError(f"{path}: damaged, or of another release ({type(error).__name__}: {error})") from error


def add_tables(page: HtmlPage, measured: Measured) -> None:
    """Its sentences and tables, and the picture that its tool left beside it.

    Raises:
        ReportError: that is no picture.
    """
    for sentence in measured.said:
        page.text(sentence)
    picture = measured.path.with_suffix(".png")
    if picture.is_file():
        try:
            page.image(picture.read_bytes(), alt=f"{measured.path.stem}, as a picture", caption=picture.name)
        except ValueError as error:
            raise ReportError(f"{picture}: {error}") from error
    for table in measured.tables:
        page.table(table.columns, table.rows, caption=table.caption)


def _bench(path: Path, content: Sequence[Mapping[str, Any]]) -> Measured:
    rows: list[list[Value]] = []
    for of in content:
        value, goal, (low, high) = float(of["value"]), of["goal"], map(float, of["spread"])
        is_held = goal is not None and (value <= goal if of["better"] == "lower" else value >= goal)
        limit = "" if goal is None else f"{'at most' if of['better'] == 'lower' else 'at least'} {float(goal):g}"
        verdict = "" if goal is None else "yes" if is_held else "NO"
        rows.append([str(of["measure"]), *map(rounded, (value, low, high, float(of["aa"]))), limit, verdict])
    held = [row[-1] for row in rows if row[-1]]
    columns = ["measure", "value", "p10", "p90", "A/A", "goal", "held"]
    said = f"{held.count('yes')} of {len(held)} goals are held" if held else "it has no goals"
    table = Table(columns, rows, path.name)
    return Measured(path, "bench", [table], [f"{path.name}: {said}."], goals=[*_goals(content)])


def _goals(content: Sequence[Mapping[str, Any]]) -> Iterator[Goal]:
    """Those that a ratio can be taken of."""
    for of in content:
        values, goal = (float(of["value"]), *map(float, of["spread"])), float(of["goal"] or 0.0)
        if goal > 0.0 and min(values) > 0.0:
            ratio, *spread = (goal / value if of["better"] == "lower" else value / goal for value in values)
            yield Goal(str(of["measure"]), ratio, min(spread), max(spread))


def _depths(path: Path, content: Mapping[str, Any]) -> Measured:
    tokens = {int(layer): int(count) for layer, count in content["tokens"].items()}
    if not sum(tokens.values()) or min(tokens.values()) < 0:
        raise ValueError("no tokens")
    tokens, whole, num_layers = dict(sorted(tokens.items())), sum(tokens.values()), int(content["num_layers"])
    mean = sum(layer * count for layer, count in tokens.items()) / whole
    rows = [[str(layer), f"{count:,}", share(count / whole)] for layer, count in tokens.items()]
    table = Table(["layers run", "tokens", "share"], rows, path.name)
    settings = _setting(_that_count(content["exit"]))
    said = f"{path.name}: {whole:,} tokens, {mean:.2f} of {num_layers} layers a token; {settings}."
    return Measured(path, "depths", [table], [said], tokens)


def _sweep(path: Path, content: Mapping[str, Any]) -> Measured:
    cells = [dict(_flat(cell)) for cell in content["cells"]]
    columns = list(dict.fromkeys(name for cell in cells for name in cell))
    rows = [[rounded(cell.get(name)) for name in columns] for cell in cells]
    others = {name: value for name, value in content.items() if name not in ("cells", "best")}
    said = [f"{path.name}: the best setting is {_setting(content['best'])}."]
    said += [f"{', '.join(f'{name} {rounded(value)}' for name, value in _flat(others))}."] if others else []
    heads = [name.replace("_", " ") for name in columns]
    return Measured(path, "sweep", [Table(heads, rows, path.name)], said)


def _measures(path: Path, content: Mapping[str, Any]) -> Measured:
    names = [name for name in content["at_mean_depth"] if name != "depth"]
    columns = [content["at_mean_depth"][name] for name in ("depth", *names)]
    rows = [[rounded(float(depth)), *map(share, values)] for depth, *values in zip(*columns, strict=True)]
    tables = [Table(["mean depth (layers)", *names], rows, "Agreement with full depth")]
    if content["gates"]:
        gates = [
            [f"exit {layer}", rounded(float(of["error"])), str(of["target"])] for layer, of in content["gates"].items()
        ]
        tables.append(Table(["gate", "calibration error", "right is"], gates, "How far a gate is as sure as right"))
    return Measured(path, "measures", tables, [f"{path.name}: measured on {int(content['tokens']):,} tokens."])


def _serving(path: Path, content: Mapping[str, Any]) -> Measured:
    rows: list[list[Value]] = []
    for residents, strategies in content["residents"].items():
        for name, of in strategies.items():
            waits = [of[wait][point] for wait, point in _WAITS]
            rows.append([name, *map(rounded, (int(residents), of["tokens_per_second"], *waits))])
    heads = ["strategy", "residents", f"tokens per {_second(content)}"]
    heads += [f"{wait.replace('_', ' ')} {point}" for wait, point in _WAITS]
    said = f"{path.name}: {content['costs']}; waits in {content['unit']}; policy {content['kv_policy']}."
    return Measured(path, "serving", [Table(heads, rows, path.name)], [said])


_WAITS = [("first_token", "p50"), ("first_token", "p95"), ("token", "p50"), ("token", "p99")]


def _second(content: Mapping[str, Any]) -> str:
    return {"seconds": "second", "passes": "pass"}.get(content["unit"], str(content["unit"]))


def _advice(path: Path, content: Sequence[Mapping[str, Any]]) -> Measured:
    rows = [
        [rounded(of["residents"]), *(rounded(cell[name]) for name in ("threshold", "agreement", "mean_depth"))]
        for of in content
        for cell in of["thresholds"]
    ]
    said = [f"{path.name}, {of['residents']} residents: {of['verdict']}" for of in content]
    return Measured(
        path, "advice", [Table(["residents", "threshold", "agreement", "mean depth"], rows, path.name)], said
    )


def _is_list_with(*names: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, list) and bool(content) and all(map(_is_object_with(*names), content))


def _is_object_with(*names: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, dict) and all(name in content for name in names)


_KINDS: dict[str, tuple[Callable[[Any], bool], Callable[[Path, Any], Measured]]] = {
    "bench": (_is_list_with("measure", "value"), _bench),
    "depths": (_is_object_with("num_layers", "tokens", "exit"), _depths),
    "sweep": (_is_object_with("cells", "best"), _sweep),
    "measures": (_is_object_with("curves", "at_mean_depth", "gates"), _measures),
    "serving": (_is_object_with("residents", "costs"), _serving),
    "advice": (_is_list_with("verdict", "thresholds"), _advice),
}
"""By what a file has in it, since who ran the tool chose its name."""


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of an object within as `speed low`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name} {within}", of) for within, of in _flat(value))
        else:
            yield name, _listed(value) if isinstance(value, list) else value


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _that_count(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of all settings of exits, those that say how deep tokens went."""
    names = ("mode", "measure", "threshold", "thresholds", "exits", "min_exit", "patience")
    return {name: values[name] for name in names if values.get(name) not in (None, {})}


def _setting(values: Mapping[str, Any]) -> str:
    """What an `inference.exit` section says, but for what it leaves open."""
    return ", ".join(f"{name} {rounded(value)}" for name, value in _flat(values) if value is not None)
