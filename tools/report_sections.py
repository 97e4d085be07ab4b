"""The sections of a run's report."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from types import ModuleType
from typing import Any

from html_page import HtmlPage, Value
from report_facts import seconds_of
from report_measured import Measured, add_tables
from report_run import Checkpoint, Run, Start
from report_words import duration, fault, rounded, share, size, told

_CAPTION_OF_ENDS = "At the last iteration of each exit's record; losses in nats per token"


def add_losses(page: HtmlPage, run: Run, pictures: ModuleType | None) -> None:
    """Of every exit: the curves, and where they ended."""
    if not run.exit_names:
        return
    page.heading("Losses")
    if pictures and run.losses.training:
        pictures.add_losses(page, run)
    rows = [
        [name, *(_last(run, figure.format(layer)) for figure in _OF_EXIT)] for layer, name in run.exit_names.items()
    ]
    columns = ["exit", *_OF_EXIT.values()]
    kept = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
    page.table(
        [columns[place] for place in kept], [[row[place] for place in kept] for row in rows], caption=_CAPTION_OF_ENDS
    )
    if not run.losses.validation:
        page.text("Nothing was validated (training.eval_iters is 0, or it has not come to that).")


_OF_EXIT = {
    "val/exit_{}/loss": "validation loss",
    "val/exit_{}/ppl": "perplexity",
    "val/exit_{}/accuracy": "accuracy",
    "val/exit_{}/gate_accuracy": "gate's accuracy",
    "train/exit_{}/loss": "training loss",
    "train/exit_{}/weight": "loss weight",
}


def add_settings(page: HtmlPage, run: Run, pictures: ModuleType | None) -> None:
    """What training was steered by."""
    figures = {name: run.series(f"train/{name}") for name in _NAMES}
    rows: list[list[Value]] = [
        [_NAMES[name], *map(rounded, (values[0], min(values), max(values), values[-1]))]
        for name, (_, values) in figures.items()
        if values and (name != "loss_scale" or {*values} != {1.0})
    ]
    if not rows:
        return
    page.heading("Loss weights, learning rate and gradients")
    if pictures:
        pictures.add_settings(page, run)
    page.table(["", "first", "least", "most", "last"], rows)


_NAMES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "loss_scale": "loss scale",
}


def add_speed(page: HtmlPage, run: Run, pictures: ModuleType | None) -> None:
    """Tokens per second, and where the time of a step went."""
    _, steps = run.series("perf/iter_time_s")
    if not steps:
        return
    page.heading("Speed")
    if pictures:
        pictures.add_speed(page, run)
    phases = [(name, mean(run.series(name)[1])) for name in run.names(r"time/\w+_s") if name != "time/checkpoint_s"]
    rows: list[list[Value]] = [
        [name.removeprefix("time/").removesuffix("_s"), rounded(seconds), share(seconds / (mean(steps) or math.nan))]
        for name, seconds in phases
    ]
    rows.append(["a step, all in all", rounded(mean(steps)), share(1.0)])
    page.table(["phase", "seconds", "share of a step"], rows, caption="Means over ranks and records")
    if saves := run.series("time/checkpoint_s")[1]:
        page.text(f"Checkpoints held training up for {rounded(mean(saves))} s each, between steps (mean).")
    gpus = [f"{rounded(mean(of))} {unit}" for name, unit in _OF_GPUS.items() if (of := run.series(f"perf/{name}")[1])]
    if utilization := run.series("perf/mfu")[1]:
        gpus.append(f"{share(mean(utilization))} of its peak (MFU)")
    if gpus:
        page.text(f"On each GPU, as means: {', '.join(gpus)}.")


_OF_GPUS = {"tokens_per_s_per_gpu": "tokens/s", "tflops_per_gpu": "TFLOP/s"}


def add_stages(page: HtmlPage, run: Run, placement: Sequence[str]) -> None:
    """A row for each stage: what it holds, how long it works, how much memory it takes.

    Args:
        placement: a line for each stage; empty: it is not known.
    """
    stages = range(max(len(placement), len(run.names(r"memory/stage_\d+_peak_gib"))))
    rows: list[list[Value]] = []
    for stage in stages:
        busy = run.series(f"pipeline/stage_{stage}_busy_s")[1]
        peak = run.series(f"memory/stage_{stage}_peak_gib")[1]
        place = placement[stage].partition(": ")[2] if stage < len(placement) else "-"
        work = [rounded(mean(busy)) if busy else None, rounded(max(peak)) if peak else None]
        rows.append([str(stage), *work, place])
    if rows:
        columns = ["stage", "at work (s a step)", "peak memory (GiB)", "holds"]
        page.table(columns, rows, caption="Stages; memory is that of the fullest rank")


def add_measured(page: HtmlPage, heading: str, found: Sequence[Measured]) -> None:
    """Tables of other tools' files."""
    if found:
        page.heading(heading)
    for measured in found:
        add_tables(page, measured)


def add_starts(page: HtmlPage, run: Run) -> None:
    """How each start of the run went."""
    if run.starts:
        page.heading("Starts")
        columns = ["start", "begun", "took", "processes", "host", "status", "iteration", "end"]
        page.table(columns, [_start_row(run, start) for start in run.starts])


def _start_row(run: Run, start: Start) -> list[Value]:
    seconds = seconds_of(run, start)
    ends = [str(start.outcome["reason"])] if "reason" in start.outcome else []
    ends += [fault(of) for of in start.faults]
    return [
        start.number,
        told(start.environment.get("started")),
        "-" if seconds is None else duration(seconds),
        start.num_processes,
        str(start.environment.get("host", "-")),
        rounded(start.outcome.get("exit_status")),
        rounded(start.outcome.get("iteration")),
        "; ".join(ends) or "none recorded",
    ]


def add_checkpoints(page: HtmlPage, run: Run) -> None:
    """Those that are there."""
    page.heading("Checkpoints")
    if not run.checkpoints:
        page.text("There is none.")
    else:
        final = max(run.exit_names, default=0)
        figures = [run.series(f"{kind}/exit_{final}/loss") for kind in ("val", "train")]
        losses = [dict(zip(*of, strict=True)) for of in figures]
        columns = ["step", "size", "validation loss", "training loss", "optimizer's state", "hash"]
        caption = f"Losses of {run.exit_names[final]}, in nats per token" if final else ""
        page.table(columns, [_checkpoint_row(of, losses) for of in run.checkpoints], caption=caption)
    if run.other_steps:
        page.text(f"Folders that are no checkpoints: {', '.join(run.other_steps)}.")


def _checkpoint_row(checkpoint: Checkpoint, losses: Sequence[Mapping[int, float]]) -> list[Value]:
    at_step = [of.get(checkpoint.iteration) for of in losses]
    about = checkpoint.about
    return [
        checkpoint.iteration,
        size(checkpoint.num_bytes),
        *(None if loss is None else f"{loss:.4f}" for loss in at_step),
        "yes" if about.get("has_optimizer") else "no",
        str(about.get("hash", "-"))[:16],
    ]


def add_environment(page: HtmlPage, run: Run) -> None:
    """What the newest start ran on."""
    about: dict[str, Any] = dict(run.starts[-1].environment) if run.starts else {}
    if not about:
        return
    page.heading("Environment")
    packages, git, variables = (_object(about.get(name)) for name in ("packages", "git", "variables"))
    gpus = about.get("gpus")
    changed = ", with changes" if git.get("has_changes") else ""
    page.facts(
        {
            "Machine": f"{about.get('host', '-')}, {about.get('platform', '-')}",
            "GPUs": ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else "none",
            "CUDA": str(about.get("cuda") or "none"),
            "Python": str(about.get("python", "-")),
            "Libraries": ", ".join(f"{name} {version}" for name, version in packages.items() if version) or "-",
            "Commit": f"{git.get('commit')}{changed}" if git else "not in a checkout",
            **_other_commits(run, git.get("commit")),
        }
    )
    if variables:
        lines = "\n".join(f"{name}={value}" for name, value in sorted(variables.items()))
        page.details("The launcher's variables", lines)


def _other_commits(run: Run, newest: Any) -> dict[str, Value]:
    """Of starts that ran other code than the newest."""
    commits = {start.number: _object(start.environment.get("git")).get("commit") for start in run.starts}
    others = [f"start {number}: {commit}" for number, commit in commits.items() if commit not in (None, newest)]
    return {"Other commits": ", ".join(others)} if others else {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _last(run: Run, name: str) -> Value:
    _, values = run.series(name)
    if not values:
        return None
    if name.endswith("accuracy"):
        return share(values[-1])
    return f"{values[-1]:.4f}" if name.endswith("loss") else rounded(values[-1])
