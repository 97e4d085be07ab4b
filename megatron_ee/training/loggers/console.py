"""One plain line per log interval, and a bar where stderr is a terminal."""

import logging
from collections.abc import Sequence

from tqdm import tqdm

from megatron_ee.training.loggers.interface import Figures


class Console:
    """Prints every exit's loss beside the run's pace.

    Args:
        exits: the exits to show, ascending.
        final_exit: the one that is the model's output, if it is among them.
        start: iterations that the run has done.
    """

    def __init__(self, exits: Sequence[int], *, final_exit: int, start: int, train_iters: int) -> None:
        self._exits, self._final_exit, self._train_iters = exits, final_exit, train_iters
        self._logger = logging.getLogger("megatron_ee")
        self._bar = tqdm(total=train_iters, initial=start, disable=None, leave=False, unit="it")

    def log(self, iteration: int, figures: Figures) -> None:
        kind = "val" if any(name.startswith("val/") for name in figures) else "train"
        head = "validation" if kind == "val" else f"{iteration}/{self._train_iters}"
        tail = "" if kind == "val" else _pace(figures)
        self._bar.update(iteration - self._bar.n)
        with tqdm.external_write_mode():
            self._logger.info("%s  %s%s", head, self._losses(kind, figures), tail)

    def _losses(self, kind: str, figures: Figures) -> str:
        losses = {layer: figures.get(f"{kind}/exit_{layer}/loss") for layer in self._exits}  # None: it did not run
        of_exits = [
            f"{'final' if layer == self._final_exit else f'exit {layer}'}: {loss:.4f}"
            for layer, loss in losses.items()
            if loss is not None
        ]
        if not of_exits:
            return "no loss, all steps were skipped"
        of_all = [f"loss {figures[f'{kind}/loss']:.4f}"] if f"{kind}/loss" in figures else []
        return "  ".join(of_all + of_exits)

    def close(self) -> None:
        self._bar.close()


def _pace(figures: Figures) -> str:
    mfu = f"  {figures['perf/mfu']:.1%} MFU" if "perf/mfu" in figures else ""
    norm = f"norm {figures['train/grad_norm']:.2f}" if "train/grad_norm" in figures else "step skipped"
    return (
        f"  lr {figures['train/lr']:.2e}  {norm}"
        f"  {figures['perf/tokens_per_s']:,.0f} tokens/s{mfu}  {_duration(figures['perf/seconds_left'])} left"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
