"""A run that several tools look at, and the tools."""

from pathlib import Path

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset
from helpers.tools import ToolsHere


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """A run folder, of a model that has learned something, but not much."""
    folder = tmp_path_factory.mktemp("tools")
    write_small_dataset(folder)
    config = run_config(
        folder,
        name="tiny",
        exits={"layers": [2, 5], "weight_schedule": {"warmup_iters": 1}},
        training={"train_iters": 30, "global_batch_size": 8},
        optimizer={"lr": 0.01},
        data={"split": [0.7, 0.3, 0.0]},
    )
    ranks.run(1, train_and_save, config)
    return folder / "runs/tiny"


@pytest.fixture
def tools_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ToolsHere:
    return ToolsHere(monkeypatch, capsys)
