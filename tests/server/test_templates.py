"""Which chat template a server takes."""

from pathlib import Path

import pytest
from helpers.tiny import tiny_config
from helpers.tokenizers import BLOCKS, CHATML, LLAMA, write_bpe, write_chat_tokenizer

from megatron_ee.errors import FieldError
from megatron_ee.server.templates import open_serving_template
from megatron_ee.tokenizer import ByteTokenizer, open_tokenizer
from megatron_ee.tokenizer.byte import CHAT_TEMPLATE


def _source(
    folder: Path, *, serving: str | None = None, learned: str = "default", kept: str | None = None
) -> str | None:
    step = folder / "step"
    step.mkdir(exist_ok=True)
    if kept is not None:
        (step / "chat_template.jinja").write_text(kept)
    data = {"format": "messages", "dataset": "talks.jsonl", "chat_template": learned}
    config = tiny_config(serving={"chat_template": serving}, data=data)
    template = open_serving_template(config, step, ByteTokenizer())
    return None if template is None else template.source


def test_the_one_that_is_nearest_to_the_server_wins(tmp_path: Path) -> None:
    own, learned = tmp_path / "own.jinja", tmp_path / "learned.jinja"
    assert _source(tmp_path) == CHAT_TEMPLATE
    own.write_text(LLAMA)
    learned.write_text(CHATML)
    assert _source(tmp_path, learned=str(learned)) == CHATML, "of a checkpoint that keeps none"
    assert _source(tmp_path, learned=str(learned), kept=BLOCKS) == BLOCKS
    learned.unlink()
    assert _source(tmp_path, learned=str(learned)) == BLOCKS
    assert _source(tmp_path, learned=str(learned), serving=str(own)) == LLAMA


def test_a_folder_that_says_nothing_has_none(tmp_path: Path) -> None:
    bpe = open_tokenizer(str(write_bpe(tmp_path / "bpe.json")))
    assert open_serving_template(tiny_config(), tmp_path, bpe) is None
    chat = open_tokenizer(str(write_chat_tokenizer(tmp_path / "chat")))
    template = open_serving_template(tiny_config(), tmp_path, chat)
    assert template is not None and template.source == CHATML


def test_one_that_is_gone_is_not_replaced_by_another(tmp_path: Path) -> None:
    with pytest.raises(FieldError) as caught:
        _source(tmp_path, learned="learned.jinja")
    assert str(caught.value) == (
        "serving.chat_template: the model learned another than its tokenizer's: learned.jinja: cannot be read (No such "
        "file or directory)"
    )
    with pytest.raises(FieldError, match=r"^serving\.chat_template: own\.jinja: cannot be read"):
        _source(tmp_path, serving="own.jinja")
    with pytest.raises(FieldError, match=r"^serving\.chat_template: .*step/chat_template\.jinja: line 1: "):
        _source(tmp_path, kept="{% for %}")
