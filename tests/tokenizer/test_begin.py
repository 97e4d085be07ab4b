"""What comes before a text, as transformers' own tokenizers write it."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import write_bpe_folder, write_llama2_tokenizer, write_llama3_tokenizer

from megatron_ee.errors import UserError
from megatron_ee.tokenizer import ByteTokenizer, open_tokenizer

TEXT = "early exits let a token leave, größer"


def _llama3(folder: Path, **settings: Any) -> Path:
    return write_llama3_tokenizer(folder, **settings)


def _qwen(folder: Path, **settings: Any) -> Path:
    return write_llama3_tokenizer(folder, before=None, tokenizer_class="Qwen2Tokenizer", bos_token=None, **settings)


@pytest.mark.parametrize(
    ("write", "settings", "count"),
    [
        (_llama3, {}, 1),
        (_llama3, {"add_bos_token": False}, 1),  # transformers, too, goes by tokenizer.json where there is one
        (_llama3, {"add_eos_token": True}, 1),
        (_qwen, {"add_bos_token": False}, 0),
        (_qwen, {"add_bos_token": True}, 0),
        (write_llama2_tokenizer, {}, 1),
        (write_llama2_tokenizer, {"add_bos_token": False}, 1),
        (write_bpe_folder, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, 0),
    ],
)
def test_texts_begin_as_in_transformers(tmp_path: Path, write: Any, settings: dict[str, Any], count: int) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = open_tokenizer(str(write(tmp_path, **settings)))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert [*tokenizer.begin, *tokenizer.encode(TEXT)] == theirs(TEXT).input_ids
    assert len(tokenizer.begin) == count


def test_a_copy_of_its_files_begins_texts_likewise(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_llama3_tokenizer(tmp_path / "one")))
    (tmp_path / "two").mkdir()
    for name, content in tokenizer.files().items():
        (tmp_path / "two" / name).write_bytes(content)
    assert open_tokenizer(str(tmp_path / "two")).begin == tokenizer.begin != ()


def test_bytes_have_nothing_before_them() -> None:
    assert ByteTokenizer().begin == ()


def test_a_token_before_texts_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_llama3_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace('"ids": [320]', '"ids": [999]'))
    with pytest.raises(UserError, match="its post-processor writes token 999, which is none of it"):
        open_tokenizer(str(tmp_path))
