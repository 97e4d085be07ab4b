"""What EE-LLM's training gets wrong (Chen et al. 2023, as published), each under a test that names it.

Its bubble filling (labels of other micro-batches, deadlock, bias) is in test_fills.py and in
parallel/pipeline/test_fills.py; its decoding's faults, and what it trains otherwise than it decodes, are in
inference/test_ee_llm_faults.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import whole_model
from helpers.one_step import assert_equals_reference, one_step
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from helpers.tiny import SEQUENCE_LENGTH, tiny_config

from megatron_ee.checkpoint.folders import CheckpointError
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.model.layers import Layer
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.build import build_trainer

EPSILON = {"epsilon": 1e-3}
LARGER = {"micro_batch_size": 2}  # tensor-parallel ranks wait for each other in every layer of every micro-batch
SEED_OF_SOME_LUCK = 3  # an untrained model is right once in 64 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_small_dataset(folder)
    return folder


def test_ee_llm_crashes_on_an_exit_of_the_last_stage(ranks: RankPool) -> None:
    parallel = {"pipeline": 2, "data": 1, "layout": [{"layers": 4}, {"layers": 4}]}
    config = tiny_config(exits={"layers": [6, 7]}, parallel=parallel, optimizer=EPSILON)
    assert_equals_reference(config, ranks.run(2, one_step, config))


@pytest.mark.parametrize("schedule", ["1f1b", "megatron"])
def test_ee_llm_leaves_exit_losses_out_of_the_fp16_loss_scale(folder: Path, ranks: RankPool, schedule: str) -> None:
    """With it, one optimizer step at fp16 is that of fp32; without, early exits would hardly move."""
    results = {}
    for precision, scale in (("fp32", 1.0), ("fp16", 1024.0)):
        config = run_config(
            folder,
            name=f"scale-{schedule}-{precision}",
            parallel={"pipeline": 2, "schedule": schedule},
            exits={"layers": [2, 5], "projection": "own", "weight_schedule": {"shape": "constant"}},
            training={"precision": precision, "train_iters": 1},
            optimizer={"initial_loss_scale": scale, **EPSILON},
        )
        results[precision] = ranks.run(2, train, config)
    for half, full in zip(results["fp16"], results["fp32"], strict=True):
        for name, parameter in full["parameters"].items():
            np.testing.assert_allclose(half["parameters"][name], parameter, atol=2e-3, err_msg=name)


def test_ee_llm_crashes_on_a_skipped_step(folder: Path, ranks: RankPool) -> None:
    config = run_config(
        folder,
        name="skipped",
        parallel={"pipeline": 2},
        training={"precision": "fp16", "train_iters": 3},
        optimizer={"initial_loss_scale": 2.0**40},
    )
    figures = ranks.run(2, train, config)[0]["figures"]
    assert figures[1]["train/skipped"] == 1
    assert "train/grad_norm" not in figures[1]
    assert figures[3]["train/exit_2/loss"] > 0


@pytest.mark.parametrize("pipeline", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("schedule", ["1f1b", "megatron"])
def test_ee_llm_never_issues_the_last_stages_overlapped_sums(ranks: RankPool, schedule: str, pipeline: int) -> None:
    """From the second step on, every bucket of every stage is under way before the last backward returns."""
    parallel = {"pipeline": pipeline, "data": 2, "overlap_grad_reduce": True, "schedule": schedule}
    config = tiny_config(exits={"layers": [2, 5, 7]}, parallel=parallel, optimizer=EPSILON)
    for result in ranks.run(2 * pipeline, one_step, config, None, 3):
        assert result["issued_while_running"] == result["num_buckets"] > 0


def test_ee_llm_ignores_recomputation_on_stages_with_exits(ranks: RankPool) -> None:
    counts = {}
    for recompute in ("none", "full"):
        config = tiny_config(
            exits={"layers": [2, 5], "head": ["mlp", "norm"]},
            parallel={"pipeline": 2, "data": 1, "layout": [{"layers": 4}, {"layers": 4}]},
            training={"recompute": recompute},
        )
        counts[recompute] = ranks.run(2, _count_layer_forwards, config)
    assert counts["none"] == [8 * 4] * 2, "8 micro-batches through 4 layers"
    assert counts["full"] == [2 * 8 * 4] * 2, "every layer of both stages runs again in the backward"


def _count_layer_forwards(config: Config) -> int:
    count, original = 0, Layer.forward

    def counting(self: Layer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(self, *args, **kwargs)

    Layer.forward = counting  # type: ignore[method-assign]
    try:
        one_step(config)
    finally:
        Layer.forward = original  # type: ignore[method-assign]
    return count


def test_ee_llm_trains_an_exits_block_without_rotary_positions(mesh: Mesh) -> None:
    """A block's attention depends on how far apart positions are, and on nothing later."""
    stage = whole_model(mesh, exits=[2], head="block")
    hidden_SBH = torch.randn(SEQUENCE_LENGTH, 1, 32, generator=torch.Generator().manual_seed(0))
    near, far = torch.arange(SEQUENCE_LENGTH), 7 * torch.arange(SEQUENCE_LENGTH)
    with torch.no_grad():
        logits = stage.exit_logits(hidden_SBH, 2, near)
        assert not torch.allclose(logits, stage.exit_logits(hidden_SBH, 2, far), atol=1e-3)
        torch.testing.assert_close(logits, stage.exit_logits(hidden_SBH, 2, near + 100), atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[:5], stage.exit_logits(hidden_SBH[:5], 2, near[:5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab_size", [258, pytest.param(1000, marks=pytest.mark.slow)])
def test_ee_llm_has_a_vocabulary_size_written_into_its_loop(folder: Path, ranks: RankPool, vocab_size: int) -> None:
    """Untrained exits are close to uniform over the vocabulary that there is."""
    config = run_config(
        folder,
        name=f"vocabulary-{vocab_size}",
        model={"vocab_size": vocab_size, "init_std": 1e-4},
        training={"train_iters": 1},
    )
    (result,) = ranks.run(1, train, config)
    for layer in (2, 5, 8):
        assert result["figures"][1][f"train/exit_{layer}/loss"] == pytest.approx(np.log(vocab_size), abs=1e-3)


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "megatron"])
def test_ee_llm_validates_no_exit(folder: Path, ranks: RankPool, schedule: str) -> None:
    config = run_config(
        folder,
        name=f"validated-{schedule}",
        parallel={"pipeline": 2, "schedule": schedule},
        training={"train_iters": 2, "eval_iters": 1},
    )
    figures = ranks.run(2, train, config)[0]["figures"][2]
    for layer in (2, 5, 8):
        assert 0 < figures[f"val/exit_{layer}/loss"] < 10
        assert f"val/exit_{layer}/accuracy" in figures


@pytest.mark.parametrize("frozen", [0, 1])
def test_ee_llm_crashes_on_a_stage_without_trainable_parameters(ranks: RankPool, frozen: int) -> None:
    parallel = {"pipeline": 2, "data": 1, "layout": [{"layers": 4}, {"layers": 4}]}
    config = tiny_config(exits={"layers": [2, 6], "projection": "own"}, parallel=parallel, optimizer=EPSILON)
    expected = ranks.run(2, one_step, config)
    actual = ranks.run(2, one_step, config, None, 1, frozen)
    assert not actual[frozen]["gradients"]
    for name, (_, pieces) in actual[1 - frozen]["gradients"].items():
        (((_, ours)), (_, theirs)) = pieces[0], expected[1 - frozen]["gradients"][name][1][0]
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("chunk_rows", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_ee_llm_takes_a_share_of_the_vocabulary_for_all_of_it(ranks: RankPool, chunk_rows: int) -> None:
    """How often an exit's likeliest token is right, where two ranks hold half of the vocabulary each."""
    exits = {"layers": [2, 5], "loss_chunk_rows": chunk_rows}
    (alone,) = ranks.run(1, one_step, tiny_config(exits=exits, parallel={"data": 1}, seed=SEED_OF_SOME_LUCK))
    config = tiny_config(exits=exits, parallel={"data": 1, "tensor": 2}, training=LARGER, seed=SEED_OF_SOME_LUCK)
    split = ranks.run(2, one_step, config)
    names = [f"train/exit_{layer}/accuracy" for layer in (2, 5, 8)]
    assert any(alone["figures"][name] > 0 for name in names)
    for name in names:
        assert split[0]["figures"][name] == split[1]["figures"][name] == pytest.approx(alone["figures"][name])


@pytest.mark.parametrize("chunk_rows", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_ee_llm_weighs_tokens_by_a_shard_of_the_vocabulary(ranks: RankPool, chunk_rows: int) -> None:
    """A token's weight is a probability over the whole vocabulary: two ranks with a half each have the gradients of one
    rank, which are others than without weights."""
    exits = {"layers": [2, 5], "loss_chunk_rows": chunk_rows, "token_weights": "max_probability"}
    fields: dict[str, Any] = {"parallel": {"data": 1, "tensor": 2}, "training": LARGER, "optimizer": EPSILON}
    config = tiny_config(exits=exits, **fields)
    split = ranks.run(2, one_step, config)
    assert_equals_reference(config, split)
    equal = tiny_config(exits={**exits, "token_weights": "none"}, **fields)
    (_, of_equal), (_, weighted) = (
        result["gradients"]["exits.2.norm.weight"][1][0] for result in (ranks.run(2, one_step, equal)[0], split[0])
    )
    assert np.abs(weighted).max() < 0.5 * np.abs(of_equal).max(), "an untrained exit is sure of nothing"


def test_another_temperature_is_another_model(folder: Path, ranks: RankPool) -> None:
    """It is the checkpoint's; a run that goes on with another one would decode and train something else."""
    train_iters = {"training": {"train_iters": 2}}
    exits = {"layers": [2, 5], "temperature": 2.0}
    ranks.run(1, _train_one, run_config(folder, name="warm", exits=exits, **train_iters))
    for temperature, said in (([2.0, 4.0], "2.0, not (2.0, 4.0)"), (1.0, "2.0, not 1.0")):
        changed = run_config(folder, name="warm", exits={**exits, "temperature": temperature}, **train_iters)
        (message,) = ranks.run(1, _refusal, changed)
        assert f"exits.temperature is {said}" in message


def test_ee_llm_overwrites_trained_heads_when_exits_are_added(folder: Path, ranks: RankPool) -> None:
    """A run's exits are its checkpoint's: others are refused, and nothing is written."""
    train_iters = {"training": {"train_iters": 2}}
    ranks.run(1, _train_one, run_config(folder, name="heads", exits={"layers": [2]}, **train_iters))
    (message,) = ranks.run(1, _refusal, run_config(folder, name="heads", exits={"layers": [2, 5]}, **train_iters))
    assert "exits.layers is (2,), not (2, 5)" in message


def _train_one(config: Config) -> None:
    train(config, until=1, save=True)


def _refusal(config: Config) -> str:
    try:
        build_trainer(config, choose_device("cpu"))
    except CheckpointError as error:
        return str(error)
    return "nothing was refused"
