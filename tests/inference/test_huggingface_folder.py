"""Hugging Face folders, decoded as they are: at full depth and at each exit, as transformers would."""

import io
import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from helpers.decoding import full_logits, request, texts_of, tokens_of
from helpers.huggingface import ARCHITECTURES, save_model
from helpers.ranks import RankPool
from helpers.tokenizers import write_bpe_folder
from safetensors.torch import save_file

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.config import ConfigError, ExitParams, ExitsConfig
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError
from megatron_ee.huggingface.exit_files import exits_json
from megatron_ee.inference.__main__ import main, split_settings
from megatron_ee.inference.declared_exits import exits_to_decode
from megatron_ee.inference.loading import load_model
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.opening import open_decoding_config

FIELDS = {"vocab_size": 330, "eos_token_id": 329, "bos_token_id": 329}
SHARED = ("exits.layers=all", "exits.norm=shared")
PROMPT = (5, 80, 200, 7, 31)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer; it never ends."""
    folder = tmp_path_factory.mktemp("decoded") / "llama"
    save_model(folder, "Llama", **FIELDS)
    return write_bpe_folder(folder, eos_token="!")


def _open(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The logits of every exit after each token of the prompt, and what greedy decoding at each makes of it."""
    with open_decoding_config(find_model(folder), overrides) as config:
        model = load_model(folder, config, choose_device("cpu"))
    layers = (*model.exits, model.stage.model.num_layers)
    logits = {layer: full_logits(model.stage, PROMPT, layer).float().numpy() for layer in layers}
    return {
        "logits": logits,
        "dtype": str(next(model.stage.parameters()).dtype),
        "tokens": {layer: _greedy(model, layer) for layer in layers},
        "tokenizer": model.tokenizer.name,
    }


def _greedy(model: OpenedModel, layer: int) -> list[int]:
    changes = {"mode": "full"} if layer == model.stage.model.num_layers else {"threshold": 0.0, "exits": (layer,)}
    (text,) = texts_of(model, [request(PROMPT, ExitParams.model_validate(changes), max_new_tokens=NEW_TOKENS)])
    return tokens_of(text)


def _of_transformers(folder: Path, layer: int, vocab_size: int) -> tuple[np.ndarray, list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=layer)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0].float().numpy()
    tokens = torch.tensor([PROMPT])
    # beyond the tokenizer's is padding, which is never chosen
    banned = list(range(vocab_size, model.config.vocab_size))
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(tokens, suppress_tokens=banned, **settings)
    return logits, whole[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_exit_computes_what_transformers_does(
    folder: Path, ranks: RankPool, architecture: str, tmp_path: Path
) -> None:
    if architecture != "Llama":
        folder = write_bpe_folder(save_model(tmp_path / "model", architecture, **FIELDS), eos_token="!")
    (opened,) = ranks.run(1, _open, folder, SHARED)
    assert opened["tokenizer"].startswith("hf-")
    assert list(opened["logits"]) == [1, 2, 3, 4]
    for layer, ours in opened["logits"].items():
        logits, tokens = _of_transformers(folder, layer, 320)
        np.testing.assert_allclose(ours, logits, atol=1e-5, err_msg=str(layer))
        assert opened["tokens"][layer] == tokens, layer


def test_exits_beside_the_model_are_decoded_with(folder: Path, ranks: RankPool, tmp_path: Path) -> None:
    """An exit whose norm is not the model's."""
    with_exits = tmp_path / "with-exits"
    shutil.copytree(folder, with_exits)
    weight_H = torch.linspace(0.5, 1.5, 32)
    save_file({"exits.2.norm.weight": weight_H}, with_exits / "exits.safetensors")
    (with_exits / "exits.json").write_bytes(exits_json(ExitsConfig(layers=(2,), temperature=2.0), "0" * 64))
    (opened,) = ranks.run(1, _open, with_exits, ())
    cut = transformers.AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=2)
    with torch.no_grad():
        cut.model.norm.weight.copy_(weight_H)
        logits = cut(torch.tensor([PROMPT])).logits[0].numpy() / 2
    np.testing.assert_allclose(opened["logits"][2], logits, atol=1e-5)
    command = ("--checkpoint", str(with_exits), "--prompt", "a", "exits.layers=[3]")
    ((status, _, err),) = ranks.run(1, _command, *command)
    assert status == 2
    assert f"exits.layers: {with_exits} has exits after layers [2], as trained" in err


def test_it_is_of_the_dtype_that_it_was_saved_in(tmp_path: Path, ranks: RankPool) -> None:
    half = write_bpe_folder(save_model(tmp_path / "half", "Llama", dtype=torch.bfloat16, **FIELDS), eos_token="!")
    (opened,) = ranks.run(1, _open, half, ())
    assert opened["dtype"] == "torch.bfloat16"
    logits, _ = _of_transformers(half, 4, 320)
    np.testing.assert_allclose(opened["logits"][4], logits, atol=0.1)


def _command(*arguments: str) -> tuple[int, str, str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ee").addHandler(handler)
    try:
        with (
            patch.object(sys, "argv", ["inference", *arguments]),
            redirect_stdout(io.StringIO()) as out,
            redirect_stderr(io.StringIO()) as err,
        ):
            status = main()
    finally:
        logging.getLogger("megatron_ee").removeHandler(handler)
    return status, out.getvalue(), err.getvalue() + "\n".join(lines)


def test_the_command_opens_it_and_says_once_that_exits_may_be_untrained(folder: Path, ranks: RankPool) -> None:
    common = ("--checkpoint", str(folder), "--prompt", "early exits", "inference.sampling.max_new_tokens=4")
    ((status, out, err),) = ranks.run(1, _command, *common, *SHARED, "inference.exit.threshold=0.0")
    assert (status, err) == (
        0,
        f"exits 1, 2, 3 share the norm and the projection of {folder}, and nothing says that they were trained",
    )
    assert out.startswith("early exits")
    ((status, out, err),) = ranks.run(1, _command, *common)
    assert (status, err) == (0, "")


def test_a_config_says_how(folder: Path, ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "decode.yaml"
    path.write_text(
        f"name: run\nmodel: {{like: {folder}}}\nexits: {{layers: [2], norm: shared}}\n"
        "training: {train_iters: 1, global_batch_size: 1, micro_batch_size: 1}\n"
        "data: {sequence_length: 64}\ninference: {sampling: {max_new_tokens: 2}}\n"
    )
    ((status, out, _),) = ranks.run(1, _command, str(path), "--checkpoint", str(folder), "--prompt", "a", "seed=1")
    assert status == 0
    assert "tokens                 2 in 1 text" in out
    path.write_text(
        path.read_text().replace(f"{{like: {folder}}}", "{num_layers: 8, hidden_size: 32, num_attention_heads: 4}")
    )
    ((status, _, err),) = ranks.run(1, _command, str(path), "--checkpoint", str(folder), "--prompt", "a")
    assert status == 2
    assert err.startswith(f"checkpoint: {folder} is of another model than the config: model.num_layers is 4, not 8")


def test_what_cannot_be_decoded_is_said_in_a_line(folder: Path, ranks: RankPool, tmp_path: Path) -> None:
    common = ("--prompt", "a", "--checkpoint")
    for override, message in (
        (
            "exits.layers=[2]",
            f"{folder}: exits.norm: exit 2 has a norm of its own, but {folder} has no exits (exits.json)",
        ),
        ("exits.layers=[4]", "override 'exits.layers=[4]': exits.layers.0: 4 must be below num_layers = 4"),
        ("model.num_layers=8", "override 'model.num_layers=8': model.num_layers: 8 is not 4, which"),
    ):
        ((status, out, err),) = ranks.run(1, _command, *common, str(folder), override)
        assert (status, out) == (2, "")
        assert message in err, override
    save_model(tmp_path / "mute", "Llama", **FIELDS)
    with (
        pytest.raises(ConfigError, match="has no tokenizer, so one has to be named"),
        open_decoding_config(tmp_path / "mute", ()),
    ):
        pass
    with open_decoding_config(tmp_path / "mute", ["data.tokenizer=bytes"]) as config:
        assert config.data.tokenizer == "bytes"


@pytest.mark.parametrize(
    ("declared", "field"),
    [
        ({"layers": (2,)}, "exits.norm"),
        ({"layers": (2,), "norm": "shared", "projection": "own"}, "exits.projection"),
        ({"layers": (1, 2), "norm": "shared", "gate": ("none", "linear")}, "exits.gate"),
        ({"layers": (2,), "head": "mlp"}, "exits.norm"),
    ],
)
def test_exits_that_have_parameters_of_their_own_cannot_be_declared(declared: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        exits_to_decode(Path("llama"), ExitsConfig(), ExitsConfig(**declared))
    assert caught.value.field == field


def test_exits_that_are_there_are_taken_as_they_are() -> None:
    own = ExitsConfig(layers=(2, 3), head=("norm", "mlp"), temperature=(1.0, 2.0))
    assert exits_to_decode(Path("llama"), own, ExitsConfig()) is own
    assert exits_to_decode(Path("llama"), own, own.model_copy(update={"weights": (1.0, 2.0)})) is own
    for other in ({"layers": (2,), "head": ("norm",), "temperature": 1.0}, {"head": "norm"}, {"temperature": 2.0}):
        with pytest.raises(FieldError, match=r"has exits after layers \[2, 3\], as trained"):
            exits_to_decode(Path("llama"), own, ExitsConfig.model_validate({**own.model_dump(), **other}))


def test_a_config_comes_before_overrides() -> None:
    assert split_settings(["run.yaml", "seed=1"]) == (Path("run.yaml"), ["seed=1"])
    assert split_settings(["seed=1"]) == (None, ["seed=1"])
    assert split_settings([]) == (None, [])
