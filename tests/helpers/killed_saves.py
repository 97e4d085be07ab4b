"""Runs that kill themselves while they save: one for each step of a save, in processes forked from one that has
imported everything. Forked processes get no threads, so that one has none: it does nothing but fork."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any, NoReturn

from megatron_ee.checkpoint import description, saver, staging, writing
from megatron_ee.config import Config, load_config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer
from megatron_ee.training.trainer import Trainer

SAVED, KILLED = 2, 4
"""The iterations of the first save, which nothing disturbs, and of the second, in which a run dies."""

UNDISTURBED = "undisturbed"


def _power_cut(*_: object, **__: object) -> NoReturn:
    """This process and all that it started are gone at once, whichever of its threads is at this point."""
    while True:
        os.killpg(0, signal.SIGKILL)


def _before(owner: Any, name: str) -> None:
    setattr(owner, name, _power_cut)


def _after(owner: Any, name: str) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def last(*args: object, **kwargs: object) -> NoReturn:
        _power_cut(function(*args, **kwargs))

    setattr(owner, name, last)


def _before_naming(name: str) -> None:
    """Before what was written aside gets the name by which others find it."""
    replace = Path.replace

    def replace_or_die(aside: Path, target: Path) -> Path:
        return _power_cut() if target.name == name else replace(aside, target)

    Path.replace = replace_or_die  # type: ignore[method-assign, assignment]


def _in_the_middle_of_the_description() -> None:
    def dump(content: object, file: Any, **_: object) -> None:
        text = json.dumps(content)
        file.write(text[: len(text) // 2])
        file.flush()
        _power_cut()

    vars(description)["json"] = SimpleNamespace(dump=dump)


def _while_training_goes_on() -> None:
    """A shard is half written, and the next step half done."""
    write_item, train_step, has_come = writing._write_item, Trainer.train_step, threading.Event()

    def write_and_wait(*args: Any) -> Any:
        written = write_item(*args)
        has_come.wait()
        return written

    def train_and_die(trainer: Trainer, *args: Any, **kwargs: Any) -> NoReturn:
        has_come.set()
        _power_cut(train_step(trainer, *args, **kwargs))

    vars(writing)["_write_item"] = write_and_wait
    Trainer.train_step = train_and_die  # type: ignore[method-assign]


PREPARE_DEATH: dict[str, Callable[[], None]] = {
    "no-folder": lambda: _before(saver.Saver, "_prepare"),
    "empty-folder": lambda: _after(saver.Saver, "_prepare"),
    "staged": lambda: _after(staging.Staging, "copy"),
    "half-a-shard": lambda: _after(writing, "_write_item"),
    "while-training": _while_training_goes_on,
    "no-metadata": lambda: _before(saver, "write_metadata"),
    "no-description": lambda: _before(saver, "write_description"),
    "half-a-description": _in_the_middle_of_the_description,
    "description-aside": lambda: _before_naming("format.json"),
    "no-link": lambda: _before(saver, "link_latest"),
    "link-aside": lambda: _before_naming("latest"),
    "linked": lambda: _after(saver, "link_latest"),
}
"""How far a save is when the run dies, in the order of its steps, and what makes the next save die there."""


def kill_and_start_again(config: Path, names: Sequence[str]) -> None:
    """A run UNDISTURBED, and one of each of these names of PREPARE_DEATH, which dies so and is started again.

    Beside `config` come, by these names, what a death left of the run's folder (killed/NAME), and what the processes
    printed (NAME.killed, NAME.log); in statuses.json how they ended.
    """
    folder = config.parent

    def in_a_fork(log: str, function: Callable[..., None], *args: Any) -> int:
        """The exit status of `function(config, *args)` in a process that leads a group of its own."""
        if (pid := os.fork()) == 0:
            os.setsid()
            file = os.open(folder / log, os.O_CREAT | os.O_WRONLY)
            os.dup2(file, sys.stdout.fileno())
            os.dup2(file, sys.stderr.fileno())
            function(config, *args)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    statuses = {UNDISTURBED: [in_a_fork(f"{UNDISTURBED}.log", _train, UNDISTURBED)]}
    for name in names:
        killed = in_a_fork(f"{name}.killed", _train_until_killed, name)
        copytree(folder / "runs" / name, folder / "killed" / name, symlinks=True)
        statuses[name] = [killed, in_a_fork(f"{name}.log", _train, name)]
    (folder / "statuses.json").write_text(json.dumps(statuses))


def _train(config: Path, name: str) -> None:
    trainer = build_trainer(_config(config, name), choose_device("cpu"))
    trainer.train()
    trainer.close()


def _train_until_killed(config: Path, name: str) -> None:
    trainer = build_trainer(_config(config, name), choose_device("cpu"))
    trainer.train(until=SAVED)
    PREPARE_DEATH[name]()
    trainer.train()


def _config(config: Path, name: str) -> Config:
    return load_config(config, [f"name={name}"])
