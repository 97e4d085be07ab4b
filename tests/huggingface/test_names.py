"""Every row of our parameters is one row of theirs, and every row of theirs one of ours."""

from pathlib import Path

import pytest
import torch
from helpers.huggingface import ARCHITECTURES, make_model, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.config import ModelConfig
from megatron_ee.huggingface.folder import open_folder
from megatron_ee.huggingface.names import Recipe, recipes_of


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.integers(1, 3))
    return ModelConfig(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 5)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_key_value_heads=groups,
        head_dim=2 * draw(st.integers(1, 3)),
        ffn_hidden_size=draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 9)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


def _rows(recipe: Recipe, start: int, stop: int) -> list[tuple[str, int]]:
    rows: list[tuple[str, int]] = []
    for piece in recipe.rows(start, stop):
        assert piece.at == len(rows)
        rows += [(piece.tensor, row) for row in range(piece.start, piece.stop)]
    return rows


@settings(max_examples=60)
@given(models(), st.data())
def test_rows_are_rows_there_and_back(model: ModelConfig, data: st.DataObject) -> None:
    for name, recipe in recipes_of(model).items():
        assert recipe.name == name
        rows = _rows(recipe, 0, recipe.shape[0])
        theirs = [(tensor, row) for tensor, shape in recipe.tensors.items() for row in range(shape[0])]
        assert len(rows) == recipe.shape[0] and sorted(rows) == sorted(theirs)
        start = data.draw(st.integers(0, recipe.shape[0]))
        stop = data.draw(st.integers(start, recipe.shape[0]))
        assert _rows(recipe, start, stop) == rows[start:stop]
        for tensor, shape in recipe.tensors.items():
            back = [ours for piece in recipe.back(tensor) for ours in range(piece.start, piece.stop)]
            assert [rows[row] for row in back] == [(tensor, row) for row in range(shape[0])]
            assert shape[1:] == recipe.shape[1:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_model_is_covered(tmp_path: Path, architecture: str) -> None:
    theirs = make_model(architecture).state_dict()
    folder = open_folder(save_model(tmp_path, architecture))
    assert theirs.keys() == {name for recipe in folder.recipes.values() for name in recipe.tensors}
    qkv = folder.read_parameter("layers.2.self_attention.linear_qkv.weight")
    q, k, v = (theirs[f"model.layers.1.self_attn.{kind}_proj.weight"] for kind in "qkv")
    width = k.shape[0] // 2
    expected = [q[: 2 * width], k[:width], v[:width], q[2 * width :], k[width:], v[width:]]
    assert torch.equal(qkv, torch.cat(expected))
    rows = slice(width + 1, 3 * width + 2)
    assert torch.equal(folder.read_parameter("layers.2.self_attention.linear_qkv.weight", rows), qkv[rows])
    fc1 = folder.read_parameter("layers.4.mlp.linear_fc1.weight")
    gate_and_up = [theirs[f"model.layers.3.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(fc1, torch.cat(gate_and_up))
    assert torch.equal(folder.read("model.embed_tokens.weight", slice(3, 7)), theirs["model.embed_tokens.weight"][3:7])
