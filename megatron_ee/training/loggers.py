"""Where a run's figures go. Names of figures: `train/...`, `val/...`, `perf/...`, with `exit_<layer>` for each exit."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

Figures = Mapping[str, float]


class Logger(Protocol):
    """One destination. `log` is called by the main rank alone."""

    def log(self, iteration: int, figures: Figures) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a line, appended; the record of a run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def log(self, iteration: int, figures: Figures) -> None:
        self._file.write(json.dumps({"iteration": iteration, **figures}) + "\n")

    def close(self) -> None:
        self._file.close()


class Console:
    """One plain line per log interval, and a bar where stderr is a terminal.

    Args:
        exits: the exits to show, ascending; the last is the final output.
    """

    def __init__(self, exits: Sequence[int], *, start: int, train_iters: int) -> None:
        self._exits, self._train_iters = exits, train_iters
        self._logger = logging.getLogger("megatron_ee")
        self._bar = tqdm(total=train_iters, initial=start, disable=None, leave=False, unit="it")

    def log(self, iteration: int, figures: Figures) -> None:
        kind = "val" if "val/loss" in figures else "train"
        exits = "  ".join(f"exit {layer}: {figures[f'{kind}/exit_{layer}/loss']:.4f}" for layer in self._exits[:-1])
        final = f"final: {figures[f'{kind}/exit_{self._exits[-1]}/loss']:.4f}"
        head = "validation" if kind == "val" else f"{iteration}/{self._train_iters}"
        tail = (
            ""
            if kind == "val"
            else (
                f"  lr {figures['train/lr']:.2e}  norm {figures['train/grad_norm']:.2f}"
                f"  {figures['perf/tokens_per_s']:,.0f} tokens/s  {_duration(figures['perf/seconds_left'])} left"
            )
        )
        self._bar.update(iteration - self._bar.n)
        with tqdm.external_write_mode():
            self._logger.info("%s  loss %.4f  %s  %s%s", head, figures[f"{kind}/loss"], exits, final, tail)

    def close(self) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
