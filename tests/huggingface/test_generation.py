"""Which tokens end a text, as a folder says it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_ee.errors import UserError
from megatron_ee.huggingface.generation import end_tokens


def _write(folder: Path, config: Any, generation: Any = ...) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not ...:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "tokens"),
    [
        ({"eos_token_id": 2}, ..., (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 0]}, (5, 0)),
        ({"eos_token_id": [1, 2]}, {"temperature": 0.6}, (1, 2)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": None}, ..., ()),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, {"eos_token_id": []}, ()),
    ],
)
def test_generation_config_comes_before_config(tmp_path: Path, config: Any, generation: Any, tokens: Any) -> None:
    assert end_tokens(_write(tmp_path, config, generation)) == tokens


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    transformers.LlamaConfig(eos_token_id=[3, 4]).save_pretrained(tmp_path)
    assert end_tokens(tmp_path) == (3, 4)
    transformers.GenerationConfig(eos_token_id=9).save_pretrained(tmp_path)
    assert end_tokens(tmp_path) == (9,)


@pytest.mark.parametrize("value", ["</s>", -1, True, 1.0, [1, "2"], [[1]], {"id": 2}])
def test_what_is_no_token_is_named(tmp_path: Path, value: Any) -> None:
    _write(tmp_path, {"eos_token_id": 2}, {"eos_token_id": value})
    with pytest.raises(UserError) as caught:
        end_tokens(tmp_path)
    path = tmp_path / "generation_config.json"
    assert str(caught.value) == (f"{path}: eos_token_id is {json.dumps(value)}: neither a token id nor a list of them")


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_file_is_no_missing_one(tmp_path: Path, content: str) -> None:
    _write(tmp_path, {"eos_token_id": 2})
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json: not"):
        end_tokens(tmp_path)
