"""Weights & Biases. A run never fails on its account: the first failure is logged, and then this logger is quiet."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ee.config import Config
from megatron_ee.training.loggers.interface import Figures

if TYPE_CHECKING:
    from wandb import Run

FINISH_TIMEOUT_S = 120.0


class WeightsAndBiases:
    """The run under its name, with the resolved config; resumed, it goes on as the same run.

    Its id is in RUN/wandb_id. Iterations that a resumed run does again stay there as they were first logged: wandb
    takes no step twice. Where and as whom it reports is in wandb's own environment and login. What goes up are the
    figures, the config and the machine's load: no command line, no output, no code, no environment.
    """

    def __init__(self, config: Config, run_folder: Path) -> None:
        self._run: Run | None = None
        self._logger = logging.getLogger("megatron_ee")
        with self._failing_quietly():
            self._run = _start(config, run_folder)
            where = self._run.dir if self._run.offline else self._run.url or "which is disabled"
            self._logger.info("wandb: run %s, %s", self._run.id, where)

    def log(self, iteration: int, figures: Figures) -> None:
        with self._failing_quietly():
            if self._run is not None:
                self._run.log(dict(figures), step=iteration)

    def close(self) -> None:
        with self._failing_quietly():
            if self._run is not None:
                self._run.finish()

    @contextmanager
    def _failing_quietly(self) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            self._run = None
            install = "pip install 'megatron-ee[wandb]'"
            self._logger.warning("wandb: going on without, %s is not installed: %s", error.name, install)
        except Exception as error:  # whatever it is, it is not worth a run
            self._run = None
            message = " ".join(str(error).split())  # on one line
            self._logger.warning("wandb: going on without, %s: %s", type(error).__name__, message)


def _start(config: Config, run_folder: Path) -> "Run":
    import wandb

    settings = config.logging.wandb
    assert settings is not None, "the config has no logging.wandb"
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=config.name,
        id=_run_id(run_folder / "wandb_id"),
        resume="allow",
        mode=settings.mode,  # None: WANDB_MODE says
        tags=settings.tags,
        config=config.model_dump(mode="json"),
        dir=run_folder,
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            finish_timeout=FINISH_TIMEOUT_S,  # a network that is gone doesn't hold the ranks at the end
        ),
    )


def _run_id(path: Path) -> str:
    """The run's id, made up the first time."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
