"""What a run does when something is changed or goes wrong between two starts."""

from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError, UserError
from megatron_ee.training.build import _begin_attempt, build_trainer
from megatron_ee.training.operations.run_lock import RunLock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_dataset(tmp_path)
    return tmp_path


def _train_to_two(config: Config) -> None:
    train(config, until=2, save=True)


def _refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        build_trainer(config, choose_device("cpu"))
    return str(caught.value)


def test_a_refused_start_leaves_the_runs_config_alone(folder: Path, ranks: RankPool) -> None:
    ranks.run(1, _train_to_two, run_config(folder, name="r"))
    before = (folder / "runs/r/config.yaml").read_text()
    (said,) = ranks.run(1, _refused, run_config(folder, name="r", model={"ffn_hidden_size": 64}))
    assert "ffn_hidden_size is 48, not 64" in said
    assert (folder / "runs/r/config.yaml").read_text() == before


def _groups(config: Config) -> list[tuple[Any, ...]]:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    trainer.train()
    return [(group["betas"], group["eps"]) for group in trainer.optimizer._optimizer.param_groups]  # type: ignore[attr-defined]


def test_a_resumed_run_takes_the_optimizers_settings_from_the_config(folder: Path, ranks: RankPool) -> None:
    ranks.run(1, _train_to_two, run_config(folder, name="r"))
    changed = run_config(folder, name="r", optimizer={"beta2": 0.5, "epsilon": 1e-3})
    (groups,) = ranks.run(1, _groups, changed)
    assert set(groups) == {((0.9, 0.5), 1e-3)}


def test_the_batch_may_be_smaller_after_a_resume(folder: Path, ranks: RankPool) -> None:
    large = {"train_iters": 4, "global_batch_size": 64, "micro_batch_size": 8, "eval_iters": 0}
    ranks.run(1, _train_to_two, run_config(folder, name="r", training=large))
    small = {**large, "global_batch_size": 8}
    (result,) = ranks.run(1, train, run_config(folder, name="r", training=small))
    assert sorted(result["figures"]) == [3, 4]


def _all_masked(config: Config) -> float:
    trainer = build_trainer(config, choose_device("cpu"))
    batch = trainer.loader.batch(0)
    batch.mask_MBS.zero_()
    return trainer.train_step(batch, 0)


def test_a_batch_that_is_masked_altogether_changes_no_gradient(folder: Path, ranks: RankPool) -> None:
    assert ranks.run(1, _all_masked, run_config(folder, name="r")) == [0.0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = run_config(tmp_path, runs=str(tmp_path / "file"))
    folder = tmp_path / "file" / config.name
    with pytest.raises(FieldError, match=r"^runs: .*/file/tiny cannot be written: Not a directory$"):
        _begin_attempt(config, folder, RunLock(folder))


def test_layernorms_are_not_recomputed_without_transformer_engine(folder: Path, ranks: RankPool) -> None:
    recompute = {"recompute": "selective", "recompute_modules": ["layernorm"]}
    (message,) = ranks.run(1, _refusal, run_config(folder, name="refused", training={"train_iters": 1, **recompute}))
    assert message.startswith("training.recompute_modules: layernorm needs Transformer Engine's layers")


def _refusal(config: Config) -> str:
    with pytest.raises(FieldError) as refused:
        build_trainer(config, choose_device("cpu"))
    return str(refused.value)
