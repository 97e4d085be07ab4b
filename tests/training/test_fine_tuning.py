"""Supervised fine-tuning, whole: it learns the answers, goes on bit for bit, and does not depend on the ranks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.conversations import chat_config, small_talks, write_talks
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from helpers.tokenizers import BLOCKS

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.config import Config

EXITS = (2, 5, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    write_talks(folder / "talks.jsonl", small_talks())
    return folder


def _config(folder: Path, name: str, **parallel: Any) -> Config:
    training = {"train_iters": 12, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 1}
    data = {"split": [80, 20, 0]}
    return chat_config(folder, name=name, data=data, training=training, parallel=parallel)


@pytest.fixture(scope="module")
def whole(folder: Path, ranks: RankPool) -> list[dict[str, Any]]:
    return ranks.run(2, train, _config(folder, "whole", pipeline=2))


def test_every_exit_learns_the_answers(whole: list[dict[str, Any]]) -> None:
    figures = whole[0]["figures"]
    for layer in EXITS:
        losses = [figures[iteration][f"train/exit_{layer}/loss"] for iteration in sorted(figures)]
        assert losses[-1] < losses[0] - 0.5
        assert figures[12][f"val/exit_{layer}/loss"] < losses[0] - 0.5


def _stop_at_five(config: Config) -> None:
    train(config, until=5, save=True)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_in_mid_epoch(
    folder: Path, ranks: RankPool, whole: list[dict[str, Any]]
) -> None:
    """Also when the conversations have to be encoded anew."""
    ranks.run(2, _stop_at_five, _config(folder, "stopped", pipeline=2))
    shutil.rmtree(folder / "data/conversations")
    resumed = ranks.run(2, train, _config(folder, "stopped", pipeline=2))
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours["started_at"] == 5
        for name, parameter in theirs["parameters"].items():
            np.testing.assert_array_equal(ours["parameters"][name], parameter, err_msg=name)


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({}, id="two replicas"),
        pytest.param({"tensor": 2, "sequence": True}, id="sequence parallel", marks=pytest.mark.slow),
    ],
)
def test_losses_do_not_depend_on_the_ranks(
    folder: Path, ranks: RankPool, whole: list[dict[str, Any]], parallel: dict[str, Any]
) -> None:
    figures = ranks.run(2, train, _config(folder, f"split{len(parallel)}", **parallel))[0]["figures"]
    for layer in EXITS:
        name = f"train/exit_{layer}/loss"
        assert [figures[i][name] for i in (1, 2, 3)] == pytest.approx(
            [whole[0]["figures"][i][name] for i in (1, 2, 3)], abs=1e-4
        )


def _stop_at_one(config: Config) -> None:
    train(config, until=1, save=True)


def test_a_checkpoint_keeps_the_template_that_was_learned(folder: Path, ranks: RankPool) -> None:
    """And hands it on to a run that begins with it and learns no conversations."""
    (folder / "own.jinja").write_text(BLOCKS)
    own, default = _config(folder, "own"), _config(folder, "default")
    own = own.model_copy(update={"data": own.data.model_copy(update={"chat_template": str(folder / "own.jinja")})})
    write_small_dataset(folder)
    later = run_config(folder, name="later", checkpoint={"initial": str(folder / "runs/own")})
    for config in (own, default, later):
        ranks.run(1, _stop_at_one, config)
    steps = {name: newest_checkpoint(folder / "runs" / name) for name in ("own", "default", "later")}
    kept = {name: step / "chat_template.jinja" for name, step in steps.items() if step is not None}
    assert {name: path.read_text() for name, path in kept.items() if path.exists()} == {"own": BLOCKS, "later": BLOCKS}
