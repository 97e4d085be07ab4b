"""Models of Hugging Face's, as they are or exported, with exits that share norm and head: our drafts at an exit lead to
the tokens of transformers' `generate(assistant_early_exit=E)`, which drafts there too, one prompt at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.decoding import request, served, tokens_of
from helpers.drafts import acceptance, drafting
from helpers.huggingface import save_model
from helpers.saved import VOCAB_SIZE, save_random_run
from helpers.tokenizers import write_bpe_folder

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.checkpoint.to_huggingface import export_model
from megatron_ee.device import Device
from megatron_ee.inference.loading import load_model
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.parallel.mesh import Mesh

NEW_TOKENS = 8


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (1 + 3 * number % 11,), generator=generator).tolist() for number in range(count)]


def _theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()


def _by_early_exit(model: Any, prompt: Sequence[int], vocab_size: int, layer: int) -> list[int]:
    """Tokens beyond our tokenizer's are padding, which is never chosen."""
    tokens_1S, banned = torch.tensor([prompt]), list(range(vocab_size, VOCAB_SIZE))
    settings = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    try:
        whole = model.generate(
            tokens_1S,
            attention_mask=torch.ones_like(tokens_1S),
            assistant_early_exit=layer,
            suppress_tokens=banned,
            **settings,
        )
    finally:  # an exception would leave the model cut at the exit
        model.config.num_hidden_layers = len(model.model.layers)
    return whole[0, len(prompt) :].tolist()


def _assert_tokens_of(theirs: Any, model: OpenedModel) -> None:
    """Of all prompts in one batch whose slots are taken again."""
    prompts = _prompts(4)
    for layer in model.exits:
        expected = [_by_early_exit(theirs, prompt, model.tokenizer.vocab_size, layer) for prompt in prompts]
        for length in (3, "auto"):
            params = drafting(draft_exit=layer, draft_length=length)
            texts = served(model, [request(prompt, params, max_new_tokens=NEW_TOKENS) for prompt in prompts], 3)
            assert [tokens_of(text) for text in texts] == expected, (layer, length)
            assert acceptance(texts) > 0 or length == "auto", "some of what is drafted is right"


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model(mesh: Mesh, cpu: Device, tmp_path: Path, tied: bool) -> None:
    config, _ = save_random_run(
        tmp_path / "run", mesh, model={"tie_embeddings": tied, "init_std": 0.3}, layers=[3, 6], norm="shared"
    )
    theirs = _theirs(export_model(tmp_path / "run", tmp_path / "theirs").folder)
    _assert_tokens_of(theirs, load_model(tmp_path / "run/checkpoints/step_00000007", config, cpu, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_a_model_that_nobody_has_tuned(cpu: Device, tmp_path: Path, architecture: str) -> None:
    """Its exits are what the config declares: its own norm and head, after any layer."""
    folder = save_model(tmp_path / "model", architecture, vocab_size=VOCAB_SIZE, initializer_range=0.3)
    write_bpe_folder(folder, eos_token="!")
    with open_decoding_config(find_model(folder), ("exits.layers=[1, 3]", "exits.norm=shared")) as config:
        model = load_model(folder, config, cpu, dtype=torch.float64)
    _assert_tokens_of(_theirs(folder), model)
