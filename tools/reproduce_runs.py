"""The runs of the results: which there are, and in which order they are trained, some beside each other."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_ee.checkpoint.folders import whole_checkpoints
from megatron_ee.config import load_config
from megatron_ee.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs/results"

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Run:
    """A config of configs/results with a seed.

    Attributes:
        drafts: whether its exits also draft for full depth, which is measured after the training.
    """

    config: str
    seed: int
    drafts: bool = False

    @property
    def name(self) -> str:
        return f"{self.config}-{self.seed}"

    @property
    def initial(self) -> str | None:
        """The run whose model it begins with."""
        return f"none-{self.seed}" if self.config in _ON_A_FINISHED_MODEL else None


_ON_A_FINISHED_MODEL = ("cold", "tuned", "tuned_random")
_THREE_SEEDS = ("none", "quarter_and_half", "every_second")
_OF_LAYERSKIP = ("layerskip", "layerskip_gradual", "loss_only", "loss_only_gradual", "dropout_only")
_ONE_SEED = ("constant_weights", "long_warmup", "cool_down", "mlp_heads", "block_heads", "own_projections")


def all_runs(num_seeds: int = 3) -> list[Run]:
    """In the order in which they are started: what others begin with comes first."""
    seeds = range(1, num_seeds + 1)
    return [
        *(Run("none", seed) for seed in seeds),
        Run("gates", 1, drafts=True),
        *(Run(config, seed) for config in _THREE_SEEDS[1:] for seed in seeds),
        *(Run(config, seed, drafts=True) for config in _OF_LAYERSKIP for seed in seeds),
        Run("dropout_30", 1, drafts=True),
        *(Run(config, 1) for config in _ONE_SEED),
        *(Run(config, seed, drafts=config == "cold") for config in _ON_A_FINISHED_MODEL for seed in seeds),
    ]


@dataclass(frozen=True, slots=True)
class Place:
    """Where runs are, and what all of them are told beside their configs."""

    folder: Path
    overrides: Sequence[str]

    def settings(self, run: Run) -> list[str]:
        """The arguments of scripts/train.sh after the config."""
        told = [f"name={run.name}", f"runs={self.folder}", f"seed={run.seed}", *self.overrides]
        if run.initial is not None:
            told.append(f"checkpoint.initial={self.folder / run.initial}")
        return told

    def config_path(self, run: Run) -> Path:
        return CONFIGS / f"{run.config}.yaml"

    def is_trained(self, run: Run) -> bool:
        iterations = load_config(self.config_path(run), self.settings(run)).training.train_iters
        return max(whole_checkpoints(self.folder / run.name), default=0) >= iterations


class StoppedError(Exception):
    """A signal came: what was being trained has been saved, and the same command goes on from there."""


class FailedError(Exception):
    """A run needs something changed. Of a worker, whose errors have to be pickled."""


def in_order(
    runs: Sequence[Run], at_once: int, work: Callable[[Run], Result], begin: Callable[[], None]
) -> Iterator[tuple[Run, Result]]:
    """Call `work` for each run in processes of their own, some at once, and yield what comes of each once it is done.
    What a run begins with is done before it; a run without that among `runs` takes it as it lies. One that fails stops
    none but those that begin with it.

    Args:
        work, begin: functions of a module: a process calls the second first, once.

    Raises:
        UserError: some failed; all others are done.
        StoppedError: a signal came, here or in a process.
    """
    left, names, done = list(runs), {run.name for run in runs}, set()
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with _handed_on() as told, ProcessPoolExecutor(at_once, mp_context=context, initializer=begin) as pool:
        going: dict[Future[Result], Run] = {}
        while True:
            ready = [run for run in left if run.initial not in names or run.initial in done]
            for run in ready[: at_once - len(going)]:
                left.remove(run)
                going[pool.submit(work, run)] = run
            if not going:
                break
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run = going.pop(future)
                try:
                    result = future.result()
                except FailedError as error:
                    failures.append(f"{run.name}: {error}")
                except BrokenProcessPool as error:
                    if told:
                        raise StoppedError from None
                    raise UserError(f"a process ended while {run.name} ran; too little memory for so many?") from error
                else:
                    done.add(run.name)
                    yield run, result
    if failures:
        raise UserError("\n".join(failures + [f"{run.name}: begins with {run.initial}" for run in left]))


@contextmanager
def _handed_on() -> Iterator[list[int]]:
    """While it lasts, SIGTERM and Ctrl-C tell the processes that begin in it to stop; yields the signals that came."""
    told: list[int] = []
    others = set(multiprocessing.active_children())

    def take(number: int, _frame: Any) -> None:
        told.append(number)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # a SIGTERM

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
