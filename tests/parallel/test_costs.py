"""Durations: hand counts of the estimate, the file of measured ones, and what chunks cost."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_config

from megatron_ee.config import Config, ExitsConfig
from megatron_ee.errors import FieldError
from megatron_ee.parallel.chunks import Chunk
from megatron_ee.parallel.costs import ModelCosts, chunk_costs, costs_of, estimated_costs, weight_share, write_costs
from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import simulate

MLP = 3 * 32 * 48
ATTENTION = 2 * SEQUENCE_LENGTH * 32
LAYER = 32 * (32 + 2 * 16 + 32) + ATTENTION + MLP
MEASURED = ModelCosts(1.0, 2.0, 0.5, 0.25, exits={"norm": 1.5, "mlp": 2.5}, transfer=0.125)


def test_hand_count_of_the_tiny_model() -> None:
    costs = estimated_costs(tiny_config(training={"micro_batch_size": 2}, parallel={"tensor": 2}), VOCAB_SIZE)
    tokens = 2 * SEQUENCE_LENGTH / 2  # of two sequences, half of each product
    projection = 32 * VOCAB_SIZE
    assert costs == ModelCosts(
        layer_forward=tokens * LAYER,
        layer_backward=tokens * 2 * LAYER,
        embedding_forward=0.0,
        embedding_backward=0.0,
        exits={
            "norm": tokens * 3 * projection,
            "mlp": tokens * 3 * (MLP + projection),
            "block": tokens * 3 * (LAYER + projection),
        },
    )


def test_windows_narrow_attention() -> None:
    """A query sees 4 positions instead of all, in half of the layers; a layer costs what they do on average."""
    full, windowed, mixed = (
        estimated_costs(tiny_config(model={"sliding_window": window, "sliding_window_layers": layers}), VOCAB_SIZE)
        for window, layers in ((SEQUENCE_LENGTH, "all"), (4, "all"), (4, [1, 2, 3, 4]))
    )
    assert full == estimated_costs(tiny_config(), VOCAB_SIZE)
    narrower = SEQUENCE_LENGTH * 2 * (SEQUENCE_LENGTH - 4) * 32
    assert full.layer_forward - windowed.layer_forward == narrower
    assert full.layer_forward - mixed.layer_forward == narrower / 2
    assert full.exits["block"] - windowed.exits["block"] == 3 * narrower


@pytest.mark.parametrize(
    ("training", "again"),
    [
        ({"recompute": "full"}, LAYER),
        ({"recompute": "selective"}, ATTENTION),
        ({"recompute": "selective", "recompute_modules": ["mlp", "layernorm"]}, MLP),
        ({"recompute_modules": ["mlp"]}, 0),
    ],
)
def test_what_is_computed_again_is_part_of_the_backward(training: dict[str, Any], again: int) -> None:
    costs = estimated_costs(tiny_config(training=training), VOCAB_SIZE)
    assert costs.layer_forward == SEQUENCE_LENGTH * LAYER
    assert costs.layer_backward == SEQUENCE_LENGTH * (2 * LAYER + again)


def test_chunks_cost_their_layers_exits_and_the_embedding() -> None:
    layout = ((Chunk(0, 2, (2,)), Chunk(5, 6, ())), (Chunk(2, 5, (3, 4)), Chunk(6, 8, (8,))))
    costs = chunk_costs(layout, ExitsConfig(layers=(2, 3, 4), head=("norm", "mlp", "mlp")), MEASURED)
    assert costs.forward == ((2.5, 1.0), (3.0, 2.0))
    assert costs.exit == ((1.5, 0.0), (5.0, 1.5))
    assert costs.backward == ((4.25, 2.0), (6.0, 4.0))
    assert costs(Action(Kind.X, 1, 0, 3)) == 5.0
    assert costs.transfer == 0.125
    stages = costs.per_stage
    assert (stages.forward, stages.exit, stages.backward) == ((3.5, 5.0), (1.5, 6.5), (6.25, 10.0))
    assert costs.totals == (11.25, 21.5)
    plan = build_plan(
        "interleaved", num_stages=2, num_chunks=2, num_microbatches=2, has_exits=[True, True, False, True]
    )
    assert sum(simulate(plan, costs).busy) == 2 * sum(costs.totals)


def test_weights_apart_are_taken_from_the_backward() -> None:
    assert weight_share(tiny_config()) * 2 * LAYER == pytest.approx(LAYER - ATTENTION), "attention's core has none"
    assert weight_share(tiny_config(training={"recompute": "full"})) * 3 * LAYER == pytest.approx(LAYER - ATTENTION)
    layout = ((Chunk(0, 2, (2,)),), (Chunk(2, 8, (8,)),))
    whole = chunk_costs(layout, ExitsConfig(layers=(2,)), MEASURED)
    split = chunk_costs(layout, ExitsConfig(layers=(2,)), MEASURED, weights=0.25)
    assert (split.backward, split.weight) == (((3.25,), (9.0,)), ((1.0,), (3.0,)))
    assert split.totals == whole.totals
    assert split(Action(Kind.W, 1, 0, 3)) == split.per_stage(Action(Kind.W, 1, 0, 3)) == 3.0
    plan = build_plan("zero-bubble", num_stages=2, num_microbatches=2, has_exits=[True, True])
    assert sum(simulate(plan, split).busy) == 2 * sum(split.totals)


def _config(path: Path, **changes: Any) -> Config:
    return tiny_config(**{"parallel": {"costs": str(path)}, "exits": {"head": ["norm", "mlp"]}, **changes})


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "costs.json"
    write_costs(path, MEASURED, _config(path), VOCAB_SIZE, device="CPU")
    return path


def test_a_file_reads_back_for_what_it_was_measured_for(measured: Path) -> None:
    assert costs_of(_config(measured), VOCAB_SIZE) == MEASURED
    assert [file.name for file in measured.parent.iterdir()] == ["costs.json"]
    other_depth = _config(measured, model={"num_layers": 6}, training={"global_batch_size": 4})
    assert costs_of(other_depth, VOCAB_SIZE) == MEASURED


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": {"ffn_hidden_size": 64}, "data": {"sequence_length": 16}},
            "was measured for model.ffn_hidden_size = 48, not 64; data.sequence_length = 12, not 16",
        ),
        ({"training": {"micro_batch_size": 2}}, "was measured for training.micro_batch_size = 1, not 2"),
        ({"training": {"precision": "bf16"}}, "was measured for training.precision = fp32, not bf16"),
        (
            {"model": {"qk_norm": True, "sliding_window": 4, "sliding_window_layers": [1, 2]}},
            "was measured for model.qk_norm = False, not True; model.sliding_window = None, not 4; "
            "model.sliding_window_layers = all, not [1, 2]",
        ),
        (
            {"training": {"recompute": "selective", "recompute_modules": ["mlp", "core_attn"]}},
            "was measured for training.recompute = none, not selective of core_attn, mlp",
        ),
        ({"exits": {"head": "block"}}, "was measured without exits.head = block: measure again"),
    ],
)
def test_a_file_for_something_else_is_refused_by_name(measured: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FieldError) as caught:
        costs_of(_config(measured, **changes), VOCAB_SIZE)
    assert str(caught.value) == f"parallel.costs: {measured} {said}"
    with pytest.raises(FieldError, match=r"model\.vocab_size = 64, not 128"):
        costs_of(_config(measured), 128)


def test_a_file_of_before_is_of_a_model_without_what_was_added(measured: Path) -> None:
    content = json.loads(measured.read_text())
    for name in ("qkv_bias", "qk_norm", "sliding_window", "sliding_window_layers"):
        del content["measured_for"][f"model.{name}"]
    measured.write_text(json.dumps(content))
    assert costs_of(_config(measured), VOCAB_SIZE) == MEASURED
    with pytest.raises(FieldError, match=r"model\.qkv_bias = False, not True"):
        costs_of(_config(measured, model={"qkv_bias": True}), VOCAB_SIZE)


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_set("version", to=2), "is of format version 2; this release reads 1"),
        (_set("seconds", "layer_forward", to=-1.0), "damaged"),
        (_set("seconds", "layer_forward", to=True), "damaged"),
        (_set("seconds", "transfer", to=float("nan")), "damaged"),
        (_set("seconds", "exits", to=[1]), "damaged"),
        (_set("seconds", "exits", "mlp", to="2"), "damaged"),
        (_set("measured_for", to=3), "damaged"),
        (lambda content: content.pop("seconds"), "damaged"),
        (lambda content: content["seconds"].update(layer_forward=0, layer_backward=0), "a layer takes no time"),
    ],
)
def test_a_damaged_file_is_refused(measured: Path, damage: Callable[[dict[str, Any]], object], said: str) -> None:
    content = json.loads(measured.read_text())
    damage(content)
    measured.write_text(json.dumps(content))
    with pytest.raises(FieldError, match=re.escape(said)):
        costs_of(_config(measured), VOCAB_SIZE)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\udcff"])
def test_what_is_no_such_file_is_refused(measured: Path, text: str) -> None:
    measured.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FieldError, match="is no file of tools/measure_costs"):
        costs_of(_config(measured), VOCAB_SIZE)


@pytest.mark.parametrize(("name", "said"), [("none", "does not exist"), (".", "is no file"), ("\0", "is no file")])
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(FieldError, match=said):
        costs_of(_config(tmp_path / name), VOCAB_SIZE)
