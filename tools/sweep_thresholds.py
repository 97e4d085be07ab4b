"""At which confidence exits should fire, and which of them may: agreement with full depth, and speed over it.

Each exit alone, and all together, at every threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sweep_results import Panel, Swept, as_cells
from sweep_timing import Speed, chosen_exits, fastest, heading, time_settings

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.comparison import agreement
from megatron_ee.inference.llm import LLM

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
AGREEMENT = 0.95

Setting = tuple[tuple[int, ...], float]
"""The exits that may fire, and the confidence that they need."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One threshold of some exits. `agreement` is the share of tokens that full depth would have chosen too, given the
    same text before them."""

    exits: tuple[int, ...]
    threshold: float
    speed: Speed
    agreement: float
    mean_depth: float


def sweep(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    exits: Sequence[int] | None,
    thresholds: Sequence[float],
    least_agreement: float,
    rounds: int,
) -> Swept:
    """
    Raises:
        FieldError: an exit is none of the model's, or a threshold is none.
    """
    settings = _settings(llm, chosen_exits(llm, exits), thresholds)
    timings = time_settings(llm, prompts, settings, rounds=rounds)
    cells = []
    for (layers, threshold), texts in timings.texts.items():
        depths = [depth for text in texts for depth in text.exit_layers]
        mean_depth = sum(depths) / len(depths)
        speed = timings.speeds[layers, threshold]
        cells.append(Cell(layers, threshold, speed, agreement(llm, texts), mean_depth))
    best = best_of(cells, least_agreement, timings.noise)
    lines = [
        heading(timings, prompts, llm),
        "",
        *table(cells, least_agreement),
        "",
        verdict(cells, best, least_agreement, timings.noise),
    ]
    content = {
        "full": {"tokens_per_second": timings.full_speed},
        "noise": timings.noise,
        "least_agreement": least_agreement,
        "cells": as_cells(cells),
    }
    chosen = ExitParams(mode="full") if best is None else settings[best.exits, best.threshold]
    return Swept(lines, chosen, content, panels(cells, best, least_agreement))


def best_of(cells: Sequence[Cell], least_agreement: float, noise: float) -> Cell | None:
    """The fastest of those that agree with full depth often enough; None: none of them is faster than full depth."""
    agreeing = {(cell.exits, cell.threshold): cell for cell in cells if cell.agreement >= least_agreement}
    best = fastest({name: cell.speed for name, cell in agreeing.items()}, noise)
    return None if best is None else agreeing[best]


def table(cells: Sequence[Cell], least_agreement: float) -> list[str]:
    """Lines, a row for each cell; those that agree too seldom are marked."""
    width = max(len(named(cell.exits, cells)) for cell in cells)
    lines = [f"{'exits':>{width}}{'threshold':>11}{'speed':>9}{'p10':>7}{'p90':>7}{'mean depth':>12}{'agreement':>11}"]
    for cell in cells:
        mark = "" if cell.agreement >= least_agreement else "  too low"
        lines.append(
            f"{named(cell.exits, cells):>{width}}{cell.threshold:>11g}{cell.speed.median:>8.2f}x{cell.speed.low:>7.2f}"
            f"{cell.speed.high:>7.2f}{cell.mean_depth:>12.2f}{cell.agreement:>11.1%}{mark}"
        )
    return lines


def verdict(cells: Sequence[Cell], best: Cell | None, least_agreement: float, noise: float) -> str:
    """One sentence on what to do."""
    if best is not None:
        return (
            f"Best: {_setting(best, cells)}: {best.speed} as fast as full depth, with {best.agreement:.1%} of "
            "its tokens."
        )
    agreeing = [cell for cell in cells if cell.agreement >= least_agreement]
    if not agreeing:
        closest = max(cells, key=lambda cell: cell.agreement)
        return (
            f"None: no setting has {least_agreement:.1%} of full depth's tokens. The closest is "
            f"{_setting(closest, cells)}, with {closest.agreement:.1%}."
        )
    highest = max(agreeing, key=lambda cell: cell.speed.median)
    return (
        f"None: no setting with {least_agreement:.1%} of full depth's tokens is faster than full depth by more "
        f"than chance ({noise:.3f}x). The highest is {_setting(highest, cells)}, {highest.speed}."
    )


def panels(cells: Sequence[Cell], best: Cell | None, least_agreement: float) -> list[Panel]:
    """Speed and agreement by threshold and exits."""
    rows = list(dict.fromkeys(cell.exits for cell in cells))
    columns = list(dict.fromkeys(cell.threshold for cell in cells))
    of = {(cell.exits, cell.threshold): cell for cell in cells}
    place = None if best is None else (rows.index(best.exits), columns.index(best.threshold))
    names, titles = [named(exits, cells) for exits in rows], [f"{threshold:g}" for threshold in columns]
    speeds = [[of[row, column].speed.median for column in columns] for row in rows]
    agreements = [[of[row, column].agreement for column in columns] for row in rows]
    shared = (names, titles, "exits that may fire", "threshold")
    return [
        Panel("speed over full depth", speeds, *shared, unit="{:.2f}x", neutral=1.0, line=1.0, best=place),
        Panel("agreement with full depth", agreements, *shared, unit="{:.1%}", line=least_agreement, best=place),
    ]


def named(exits: tuple[int, ...], cells: Sequence[Cell]) -> str:
    """As in `all` or `6`."""
    return "all" if len(exits) > 1 and exits == max((cell.exits for cell in cells), key=len) else str(exits[0])


def _setting(cell: Cell, cells: Sequence[Cell]) -> str:
    name = named(cell.exits, cells)
    return f"{'all exits' if name == 'all' else f'exit {name} alone'} at threshold {cell.threshold:g}"


def _settings(llm: LLM, exits: tuple[int, ...], thresholds: Sequence[float]) -> dict[Setting, ExitParams]:
    base = llm.config.inference.exit
    if wrong := [threshold for threshold in thresholds if not 0 <= threshold < 1]:
        raise FieldError("--thresholds", f"{wrong[0]:g} is not at least 0 and below 1, where no exit fires")
    alone = [(layer,) for layer in exits] if base.patience == 1 else []
    sets = [*alone, exits] if len(exits) > 1 else alone
    if not sets or base.patience > len(exits):
        raise FieldError("inference.exit.patience", f"{base.patience} exits in a row, but {len(exits)} may fire")
    common = {"mode": "early_exit", "min_exit": 0, "thresholds": {}}
    return {
        (layers, threshold): base.model_copy(update={**common, "exits": layers, "threshold": threshold})
        for layers in sets
        for threshold in thresholds
    }
