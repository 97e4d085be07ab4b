"""What a run begins with: another run's parameters, in any layout, and copies of them for the exits that it lacks."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import RankPool
from helpers.runs import refusal, run_config, train, write_small_dataset
from helpers.shards import Pieces, pieces_of, whole

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.checkpoint.initial import copied_from, kept_exits
from megatron_ee.config import Config, ExitsConfig, ModelConfig
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer

KINDS = {"layers": [2, 4, 5], "head": ["norm", "mlp", "block"], "projection": ["own", "shared", "own"]}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """With models whose one exit, after layer 2, has its own projection."""
    folder = tmp_path_factory.mktemp("initial")
    write_small_dataset(folder)
    for name, fields in {"base": {}, "tied": {"model": {"vocab_size": "auto", "tie_embeddings": True}}}.items():
        ranks.run(1, _train_two, _base_config(folder, name, **fields))
    return folder


def _base_config(folder: Path, name: str, **fields: Any) -> Config:
    return run_config(folder, name=name, exits={"layers": [2], "projection": "own"}, **fields)


def _train_two(config: Config) -> None:
    train(config, until=2, save=True)


def _begin(config: Config) -> tuple[Pieces, list[str]]:
    """The parameters that a run begins with, and what was said."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("megatron_ee").addHandler(handler)
    try:
        trainer = build_trainer(config, choose_device("cpu"))
    finally:
        logging.getLogger("megatron_ee").removeHandler(handler)
    assert trainer.progress.iteration == 0
    return pieces_of(trainer.stage, lambda parameter: parameter), lines


def _parameters(ranks: RankPool, world_size: int, config: Config) -> Arrays:
    return whole(pieces for pieces, _ in ranks.run(world_size, _begin, config))


def _resumed(ranks: RankPool, folder: Path, name: str, **fields: Any) -> Arrays:
    """A base model's own parameters."""
    (pieces,) = ranks.run(1, _resume, _base_config(folder, name, **fields))
    return whole([pieces])


def _resume(config: Config) -> Pieces:
    return pieces_of(build_trainer(config, choose_device("cpu")).stage, lambda parameter: parameter)


def _from(folder: Path, initial: str, name: str, **changes: Any) -> Config:
    return run_config(folder, name=name, checkpoint={"initial": str(folder / "runs" / initial)}, **changes)


@pytest.mark.parametrize(
    ("initial", "world_size", "parallel"),
    [
        ("base", 1, {}),
        ("base", 4, {"pipeline": 2, "tensor": 2, "sequence": True}),
        ("tied", 2, {"pipeline": 2}),
    ],
)
def test_new_exits_are_copies_name_by_name_and_trained_ones_stay(
    folder: Path, ranks: RankPool, initial: str, world_size: int, parallel: dict[str, Any]
) -> None:
    fields = {"model": {"vocab_size": "auto", "tie_embeddings": True}} if initial == "tied" else {}
    base = _resumed(ranks, folder, initial, **fields)
    config = _from(folder, initial, f"copies-{initial}-{world_size}", exits=KINDS, parallel=parallel, **fields)
    begun = _parameters(ranks, world_size, config)
    assert {name for name in begun if not name.startswith("exits.")} | {
        name for name in begun if name.startswith("exits.2.")
    } == base.keys()
    for name, value in base.items():
        np.testing.assert_array_equal(begun[name], value, err_msg=name)
    output = base["embedding.weight" if initial == "tied" else "output.weight"]
    expected = {"exits.4.norm.weight": base["norm.weight"], "exits.5.norm.weight": base["norm.weight"]}
    expected["exits.5.output.weight"] = output
    for name, value in base.items():
        if name.startswith(("layers.4.mlp.", "layers.4.pre_mlp_layernorm.")):
            expected[name.replace("layers.4.", "exits.4.")] = value
        if name.startswith("layers.8."):
            expected[name.replace("layers.8.", "exits.5.block.")] = value
    assert expected.keys() == {name for name in begun if name.startswith(("exits.4.", "exits.5."))}
    for name, value in expected.items():
        np.testing.assert_array_equal(begun[name], value, err_msg=name)
    assert not np.array_equal(begun["exits.2.norm.weight"], base["norm.weight"]), "a trained head is no copy"


def test_random_exits_are_those_of_the_seed(folder: Path, ranks: RankPool) -> None:
    exits = {**KINDS, "initialize": "random"}
    begun = _parameters(ranks, 1, _from(folder, "base", "random", exits=exits))
    anew = _parameters(ranks, 1, run_config(folder, name="anew", exits=exits))
    base = _resumed(ranks, folder, "base")
    for name, value in begun.items():
        is_new = name.startswith(("exits.4.", "exits.5."))
        np.testing.assert_array_equal(value, anew[name] if is_new else base[name], err_msg=name)


def test_exits_that_are_not_listed_are_left_out_aloud(folder: Path, ranks: RankPool) -> None:
    config = _from(folder, "base", "without", exits={"layers": [4]})
    ((pieces, lines),) = ranks.run(1, _begin, config)
    assert not [name for name in pieces if name.startswith("exits.2.")]
    (warning,) = (line for line in lines if line.startswith("WARNING exit 2 "))
    assert "leaves them out" in warning
    other_make = _from(folder, "base", "other-make", exits={"layers": [2]})
    ((_, lines),) = ranks.run(1, _begin, other_make)
    assert any(line.startswith("WARNING exit 2 ") for line in lines)


def test_parameters_are_rounded_to_another_precision(folder: Path, ranks: RankPool) -> None:
    config = _from(folder, "base", "half", exits={"layers": [2], "projection": "own"}, training={"precision": "bf16"})
    begun, base = _parameters(ranks, 1, config), _resumed(ranks, folder, "base")
    for name, value in base.items():
        np.testing.assert_allclose(begun[name], value, rtol=2**-8, atol=0, err_msg=name)


def test_a_resumed_run_has_no_use_for_it(folder: Path, ranks: RankPool) -> None:
    config = _from(folder, "base", "gone", exits={"layers": [2], "projection": "own"})
    ranks.run(1, _train_two, config)
    gone = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"initial": "gone"})})
    assert ranks.run(1, refusal, gone) == ["nothing was refused"]


@pytest.mark.parametrize(
    ("initial", "changes", "message"),
    [
        ("nowhere", {}, "is not a folder"),
        ("base", {"model": {"vocab_size": "auto", "num_layers": 6}}, "model.num_layers is 8, not 6"),
        ("base", {"model": {"vocab_size": "auto", "hidden_size": 64}}, "model.hidden_size is 32, not 64"),
        ("base", {"model": {"vocab_size": 384}}, "vocab_size is 320, not 384"),
        (
            "base",
            {"training": {"trains": "exits", "precision": "bf16"}},
            "training.precision is fp32, not bf16",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    folder: Path, ranks: RankPool, initial: str, changes: dict[str, Any], message: str
) -> None:
    (said,) = ranks.run(1, refusal, _from(folder, initial, "refused", **changes))
    assert said.startswith("checkpoint.initial: ")
    assert message in said
    assert not (folder / "runs/refused").exists()


def test_a_damaged_one_is_refused_and_left_where_it_is(folder: Path, ranks: RankPool) -> None:
    ranks.run(1, _train_two, _base_config(folder, "damaged"))
    step = newest_checkpoint(folder / "runs/damaged")
    assert step is not None
    (shards, *_) = sorted(step.glob("*.distcp"))
    shards.write_bytes(shards.read_bytes()[:-8])
    (message,) = ranks.run(1, refusal, _from(folder, "damaged", "refused"))
    assert f"checkpoint.initial: {step} is damaged" in message
    assert newest_checkpoint(folder / "runs/damaged") == step


def test_an_exit_is_kept_where_head_and_projection_are_the_same() -> None:
    saved = ExitsConfig(layers=(1, 2, 3), head=("norm", "mlp", "mlp"), projection=("own", "own", "shared"))
    wanted = ExitsConfig(layers=(1, 2, 3, 4), head=("norm", "mlp", "norm", "norm"), projection="own")
    assert kept_exits(saved, wanted) == [1, 2]
    gates = {"layers": (1, 2, 3, 4), "gate": ("linear", "linear", "none", "mlp")}
    of_any_gate = ExitsConfig(layers=(1, 2, 3, 4), gate=("none", "mlp", "linear", "mlp"))
    assert kept_exits(of_any_gate, ExitsConfig(**gates)) == [1, 4], "a gate may be new, and isn't replaced"
    assert kept_exits(of_any_gate, ExitsConfig(**gates, norm="shared")) == []


def test_what_has_no_counterpart_is_no_copy() -> None:
    model = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=2)
    assert copied_from("exits.3.gate.weight", model) is None
    assert copied_from("exits.3.block.mlp.linear_fc1.weight", model) == "layers.4.mlp.linear_fc1.weight"
