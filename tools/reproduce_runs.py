"""The runs of the results, and how they are trained: each by scripts/train.sh, some at once, none twice."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.folders import whole_checkpoints
from megatron_ee.config import load_config
from megatron_ee.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs/results"
SAVED_AND_STOPPED = 75


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
    """A signal came; runs have saved, and the same command goes on from there."""


def in_order(runs: Sequence[Run], at_once: int, work: Callable[[Run], Any]) -> Iterator[Run]:
    """Call `work` for each run, some at once, and yield each once it is done. What a run begins with is done before it;
    a run without that among `runs` takes it as it lies. One that fails stops none but those that begin with it.

    Raises:
        UserError: some failed; all others are done.
        StoppedError: `work` was stopped; what had begun has ended, and nothing else began.
    """
    left, names, done = list(runs), {run.name for run in runs}, set()
    failures: list[str] = []
    with ThreadPoolExecutor(at_once) as pool:
        going: dict[Future[Any], Run] = {}
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
                    future.result()
                except UserError as error:
                    failures.append(f"{run.name}: {error}")
                else:
                    done.add(run.name)
                    yield run
    if failures:
        raise UserError("\n\n".join(failures + [f"{run.name}: begins with {run.initial}" for run in left]))


class Commands:
    """Programs that run beside each other. A signal that asks for the end is handed on to all of them."""

    def __init__(self) -> None:
        self._going: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._told: int | None = None

    def run(self, command: Sequence[object], log: Path) -> None:
        """Run a program to its end, what it prints goes to `log`.

        Raises:
            StoppedError: it, or this program, was told to stop.
            UserError: it failed; with the end of its log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": _python_path()}
        with log.open("ab") as file:
            with self._lock:
                if self._told is not None:
                    raise StoppedError
                # a session of its own: Ctrl-C reaches it once, through `_hand_on`
                process = subprocess.Popen(
                    [str(part) for part in command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
                self._going.add(process)
            status = process.wait()
        with self._lock:
            self._going.discard(process)
        if self._told is not None or status == SAVED_AND_STOPPED:
            raise StoppedError
        if status != 0:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise UserError(f"{' '.join(map(str, command))}: status {status}\n{end}\nall of it: {log}")

    @contextmanager
    def handed_signals(self) -> Iterator[None]:
        """While it lasts, SIGTERM and Ctrl-C tell all programs to stop, and nothing else."""
        before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, _frame: Any) -> None:
        self._told = number
        for process in list(self._going):
            process.send_signal(signal.SIGTERM)


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
