"""Old checkpoints go, and only those that the config does not keep."""

import logging
from pathlib import Path

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.checkpoint.folders import FORMAT_FILE, newest_checkpoint, step_folder, whole_checkpoints
from megatron_ee.checkpoint.prune import prune, to_remove
from megatron_ee.config import CheckpointConfig


@given(st.sets(st.integers(1, 10**6)), st.integers(0, 9), st.integers(0, 9))
def test_the_newest_and_the_multiples_stay(iterations: set[int], keep_last: int, keep_every: int) -> None:
    removed = to_remove(iterations, keep_last=keep_last, keep_every=keep_every)
    assert removed == sorted(set(removed)) and set(removed) <= iterations
    newest = set(sorted(iterations, reverse=True)[: keep_last or None])
    multiples = {iteration for iteration in iterations if keep_every and iteration % keep_every == 0}
    assert iterations - set(removed) == newest | multiples


def _run(folder: Path, iterations: range) -> None:
    for iteration in iterations:
        step = step_folder(folder, iteration)
        step.mkdir(parents=True)
        (step / "shard").write_text("x")
        (step / FORMAT_FILE).write_text("{}")


def test_folders_go(tmp_path: Path) -> None:
    _run(tmp_path, range(10, 70, 10))
    half = step_folder(tmp_path, 5)
    half.mkdir()
    prune(tmp_path, CheckpointConfig(keep_last=2, keep_every=30))
    assert sorted(whole_checkpoints(tmp_path)) == [30, 50, 60]
    assert not step_folder(tmp_path, 10).exists()
    assert half.exists(), "what is no checkpoint is somebody else's"


def test_all_stay_by_default(tmp_path: Path) -> None:
    _run(tmp_path, range(1, 5))
    prune(tmp_path, CheckpointConfig())
    assert sorted(whole_checkpoints(tmp_path)) == [1, 2, 3, 4]


def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _run(tmp_path, range(1, 4))

    def refuse(path: Path) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(logging.getLogger("megatron_ee"), "propagate", True)
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert newest_checkpoint(tmp_path) == step_folder(tmp_path, 3)
    assert "cannot be removed: read-only" in caplog.text


def test_a_run_keeps_what_its_config_says(ranks: RankPool, tmp_path: Path) -> None:
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, checkpoint={"interval": 1, "keep_last": 2, "keep_every": 3})
    ranks.run(1, train, config)
    assert sorted(whole_checkpoints(tmp_path / "runs" / config.name)) == [3, 5, 6]
