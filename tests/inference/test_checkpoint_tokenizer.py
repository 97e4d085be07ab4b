"""A checkpoint that was trained with a tokenizer file stands alone: it is decoded without that file."""

from pathlib import Path
from typing import Any

import pytest
from helpers.decoding import request, texts_of, tokens_of
from helpers.ranks import RankPool
from helpers.runs import WORDS, run_config, train
from helpers.tokenizers import write_bpe, write_bpe_folder

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.config import CheckpointConfig, Config
from megatron_ee.data.indexed import write_indexed
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.inference.loading import load_model
from megatron_ee.tokenizer import open_tokenizer
from megatron_ee.training.build import build_trainer


def _train_one(config: Config) -> None:
    train(config, until=1, save=True)


def _decode(step: Path, config: Config) -> tuple[str, str]:
    model = load_model(step, config, choose_device("cpu"))
    prompt = model.tokenizer.encode("early exits")
    (text,) = texts_of(model, [request(prompt, config.inference.exit, max_new_tokens=4)])
    return model.tokenizer.name, model.tokenizer.decode([*prompt, *tokens_of(text)])


def _message_of_resuming(config: Config) -> str:
    try:
        build_trainer(config, choose_device("cpu"))
    except UserError as error:
        return str(error)
    return "resumed"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_holds_its_tokenizer(tmp_path: Path, ranks: RankPool, kind: str) -> None:
    def write(**changes: Any) -> Path:
        if kind == "file":
            return write_bpe(tmp_path / "bpe.json", **changes)
        return write_bpe_folder(tmp_path / "bpe", eos_token="!")

    path = write()
    tokenizer = open_tokenizer(str(path))
    write_indexed(tmp_path / "words", [" ".join(WORDS) * 20] * 10, tokenizer)
    config = run_config(tmp_path, data={"tokenizer": str(path)})
    ranks.run(1, _train_one, config)
    (path if kind == "file" else path / "tokenizer.json").unlink()
    step = newest_checkpoint(tmp_path / "runs/tiny")
    assert step is not None
    ((name, text),) = ranks.run(1, _decode, step, config)
    assert name == tokenizer.name
    assert text.startswith("early exits")


def test_another_tokenizer_under_the_same_path_is_noticed(tmp_path: Path, ranks: RankPool) -> None:
    path = tmp_path / "bpe.json"
    for vocab_size, message in ((320, "resumed"), (319, "is of another model: tokenizer is hf-")):
        write_bpe(path, vocab_size)
        tokenizer = open_tokenizer(str(path))
        write_indexed(tmp_path / "words", [" ".join(WORDS) * 20] * 10, tokenizer)
        config = run_config(tmp_path, data={"tokenizer": str(path)})
        if vocab_size == 320:
            ranks.run(1, _train_one, config)
        (answer,) = ranks.run(1, _message_of_resuming, config)
        assert message in answer


def test_a_checkpoint_whose_tokenizer_was_exchanged_is_refused(tmp_path: Path, ranks: RankPool) -> None:
    tokenizer = open_tokenizer(str(write_bpe(tmp_path / "bpe.json")))
    write_indexed(tmp_path / "words", [" ".join(WORDS) * 20] * 10, tokenizer)
    config = run_config(tmp_path, data={"tokenizer": str(tmp_path / "bpe.json")})
    ranks.run(1, _train_one, config)
    step = newest_checkpoint(tmp_path / "runs/tiny")
    assert step is not None
    write_bpe(step / "tokenizer.json", 319)
    with pytest.raises(AssertionError, match=r"tokenizer\.json is not what was saved"):
        ranks.run(1, _decode, step, config)
    unverified = config.model_copy(update={"checkpoint": CheckpointConfig(verify=False)})
    with pytest.raises(AssertionError, match=f"holds tokenizer hf-[0-9a-f]+, not {tokenizer.name}"):
        ranks.run(1, _decode, step, unverified)
