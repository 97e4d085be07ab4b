"""What Weights & Biases is told, and that nothing it does stops a run."""

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.tiny import tiny_config

from megatron_ee.training.loggers import WeightsAndBiases


class FakeRun:
    """Takes what a run takes; fails at the method named `failing`."""

    id, dir, url, offline = "abc", "folder", "https://example.org/abc", False

    def __init__(self, failing: str) -> None:
        self.failing, self.logged, self.finished = failing, [], False

    def log(self, figures: dict[str, float], step: int) -> None:
        if self.failing == "log":
            raise ConnectionError("the network\nis gone")
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.finished = True
        if self.failing == "finish":
            raise ConnectionError("the network\nis gone")


class FakeWandb(ModuleType):
    """The part of wandb that is used."""

    Settings = staticmethod(lambda **fields: fields)

    def __init__(self, failing: str = "") -> None:
        super().__init__("wandb")
        self.run, self.starts, self._failing = FakeRun(failing), [], failing

    def init(self, **arguments: Any) -> FakeRun:
        self.starts.append(arguments)
        if self._failing == "init":
            raise ConnectionError("the network\nis gone")
        return self.run


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("megatron_ee"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron_ee")
    return caplog


def _logger(folder: Path, **fields: Any) -> WeightsAndBiases:
    return WeightsAndBiases(tiny_config(logging={"wandb": {"project": "exits", **fields}}), folder)


def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        logger = _logger(tmp_path, tags=["a"])
        logger.log(step, {"train/loss": 0.5})
        logger.close()
    first, second = fake.starts
    assert first == second
    assert first["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert first["resume"] == "allow"
    assert first["project"] == "exits" and first["name"] == "tiny" and first["tags"] == ("a",)
    assert fake.run.logged == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.5})]
    assert fake.run.finished
    assert messages.messages[0] == "wandb: run abc, https://example.org/abc"
    (tmp_path / "other").mkdir()
    _logger(tmp_path / "other")
    assert fake.starts[-1]["id"] != first["id"]


def test_the_config_goes_up_and_the_surroundings_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _logger(tmp_path)
    (start,) = fake.starts
    assert start["mode"] is None, "wandb's own environment says"
    assert start["config"]["exits"]["layers"] == [2, 5]
    assert start["config"]["model"]["norm_epsilon"] == 1e-5, "defaults are there too"
    assert start["settings"]["console"] == "off"
    assert start["settings"]["x_disable_meta"] and start["settings"]["disable_git"]
    _logger(tmp_path, mode="offline")
    assert fake.starts[-1]["mode"] == "offline"


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failure_is_logged_once_and_the_rest_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture, failing: str
) -> None:
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = _logger(tmp_path)
    for iteration in (1, 2, 3):
        logger.log(iteration, {"train/loss": 0.5})
    logger.close()
    warnings = [record.getMessage() for record in messages.records if record.levelno >= logging.WARNING]
    assert warnings == ["wandb: going on without, ConnectionError: the network is gone"]


def test_a_missing_package_is_one_warning_with_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = _logger(tmp_path)
    logger.log(1, {"train/loss": 0.5})
    logger.close()
    assert messages.messages == ["wandb: going on without, wandb is not installed: pip install 'megatron-ee[wandb]'"]
