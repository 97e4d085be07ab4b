"""Which runs the results have, and in which order they go."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import reproducing

from megatron_ee.config import load_config
from megatron_ee.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import reproduce_runs

CONFIGS = Path(__file__).parents[2] / "configs/results"


def test_every_config_is_run_and_every_run_has_one() -> None:
    names = [run.name for run in reproduce_runs.all_runs()]
    assert len(set(names)) == len(names)
    assert {run.config for run in reproduce_runs.all_runs()} == {path.stem for path in CONFIGS.glob("*.yaml")}


def test_what_a_run_begins_with_is_a_run_of_its_seed() -> None:
    names = {run.name: run for run in reproduce_runs.all_runs()}
    beginning = [run for run in names.values() if run.initial]
    assert len(beginning) == 9
    assert all(names[run.initial].seed == run.seed for run in beginning)
    for run in names.values():
        config = load_config(CONFIGS / f"{run.config}.yaml")
        assert (config.training.trains == "exits") == bool(run.initial), "only these begin with another's model"


def test_settings_name_the_run_its_seed_and_what_it_begins_with(tmp_path: Path) -> None:
    place = reproduce_runs.Place(tmp_path, ["training.train_iters=3"])
    run = reproduce_runs.Run("tuned", 2)
    config = load_config(place.config_path(run), place.settings(run))
    assert (config.name, config.seed, config.runs) == ("tuned-2", 2, str(tmp_path))
    assert config.checkpoint.initial == str(tmp_path / "none-2")
    assert config.training.train_iters == 3
    assert not place.is_trained(run)


def test_a_run_waits_for_what_it_begins_with(tmp_path: Path) -> None:
    asked = [reproduce_runs.Run("tuned", 1), reproduce_runs.Run("none", 1), reproduce_runs.Run("none", 2)]
    work = reproducing.Noting(tmp_path / "noted", failing=())
    done = list(reproduce_runs.in_order(asked, 2, work, reproducing.nothing))
    assert {run.name: result for run, result in done} == {run.name: run.name.upper() for run in asked}
    events = (tmp_path / "noted").read_text().split()
    assert events.index("none-1:end") < events.index("tuned-1:begin")


def test_a_run_without_its_beginning_among_those_asked_takes_it_as_it_lies(tmp_path: Path) -> None:
    work = reproducing.Noting(tmp_path / "noted", failing=())
    assert len(list(reproduce_runs.in_order([reproduce_runs.Run("tuned", 1)], 1, work, reproducing.nothing))) == 1


def test_one_that_fails_stops_none_but_those_that_begin_with_it(tmp_path: Path) -> None:
    asked = [reproduce_runs.Run("none", 1), reproduce_runs.Run("tuned", 1), reproduce_runs.Run("gates", 1)]
    work = reproducing.Noting(tmp_path / "noted", failing=("none-1",))
    done = reproduce_runs.in_order(asked, 1, work, reproducing.nothing)
    assert next(done)[0].name == "gates-1"
    with pytest.raises(UserError) as caught:
        next(done)
    assert str(caught.value) == "none-1: no room\ntuned-1: begins with none-1"


def test_a_signal_ends_all_and_begins_nothing(tmp_path: Path) -> None:
    asked = [reproduce_runs.Run("none", seed) for seed in (1, 2, 3)]
    before = signal.getsignal(signal.SIGTERM)
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    work = reproducing.Noting(tmp_path / "noted", failing=(), seconds=30)
    reproducing.when((tmp_path / "noted"), "none-1:begin", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(reproduce_runs.StoppedError):
        list(reproduce_runs.in_order(asked, 1, work, reproducing.nothing))
    assert "none-2:begin" not in (tmp_path / "noted").read_text()
    assert signal.getsignal(signal.SIGTERM) is before
    assert other.is_alive(), "what began before is not the runs'"
    other.kill()
    other.join()
