"""Exported models: our tokens are those of transformers' greedy `generate`, at full depth and at each exit, whose
logits are those of the model that is cut there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from helpers.decoding import request, texts_of, tokens_of
from helpers.saved import VOCAB_SIZE, save_random_run

from megatron_ee.checkpoint.to_huggingface import export_model
from megatron_ee.config import Config, ExitParams
from megatron_ee.device import Device
from megatron_ee.inference.depth_walk import DepthWalk
from megatron_ee.inference.loading import load_model
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.parallel.mesh import Mesh

EXITS: dict[str, Any] = {
    "layers": [2, 4, 5, 6],
    "head": ["norm", "mlp", "block", "norm"],
    "projection": ["shared", "shared", "own", "own"],
    "temperature": [1.0, 2.0, 1.5, 1.0],
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_embeddings": True},
    "Qwen3": {"qk_norm": True, "sliding_window": 5, "sliding_window_layers": [1, 5, 7]},
}
FULL_DEPTH = {
    "full mode": ExitParams(mode="full"),
    "threshold 1.0": ExitParams(threshold=1.0),
    "no exits": ExitParams(exits=(), threshold=0.0),
}
NEW_TOKENS = 10
MARGIN = 1e-4
"""Between the two likeliest tokens: rounding of fp32 may decide below it."""


class Case(NamedTuple):
    run: Path
    config: Config

    @property
    def step(self) -> Path:
        return self.run / "checkpoints/step_00000007"


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Case:
    run = tmp_path_factory.mktemp("runs") / "random"
    config, _ = save_random_run(run, mesh, model=MODELS[request.param], **EXITS)
    return Case(run, config)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in (7, 1, 19, 4)]


def _theirs(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").to(dtype)


def _generate(model: Any, prompt: Sequence[int], vocab_size: int, **settings: Any) -> list[int]:
    """Of one prompt by itself; tokens beyond our tokenizer's are padding, which is never chosen."""
    settings = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0, **settings}
    banned = list(range(vocab_size, VOCAB_SIZE))
    tokens_1S = torch.tensor([prompt])
    whole = model.generate(
        tokens_1S, attention_mask=torch.ones_like(tokens_1S), do_sample=False, suppress_tokens=banned, **settings
    )
    return whole[0, len(prompt) :].tolist()


def _ours(model: OpenedModel, prompts: list[list[int]], params: ExitParams) -> list[list[int]]:
    """Of all prompts in one ragged batch."""
    return [
        tokens_of(text) for text in texts_of(model, [request(of, params, max_new_tokens=NEW_TOKENS) for of in prompts])
    ]


def test_full_depth_in_fp64_has_the_tokens_of_greedy_generate(case: Case, cpu: Device, tmp_path: Path) -> None:
    theirs = _theirs(export_model(case.run, tmp_path / "theirs").folder, torch.float64)
    model = load_model(case.step, case.config, cpu, dtype=torch.float64)
    expected = [_generate(theirs, prompt, model.tokenizer.vocab_size) for prompt in _prompts()]
    for way, params in FULL_DEPTH.items():
        assert _ours(model, _prompts(), params) == expected, way
    for prompt, tokens in zip(_prompts(), expected, strict=True):
        assert model.full_depth_choices([*prompt, *tokens])[len(prompt) - 1 : -1] == tokens


def test_full_depth_in_fp32_differs_only_where_two_tokens_are_equally_likely(
    case: Case, cpu: Device, tmp_path: Path
) -> None:
    theirs = _theirs(export_model(case.run, tmp_path / "theirs").folder, torch.float32)
    model = load_model(case.step, case.config, cpu)
    num_different = 0
    for prompt, ours in zip(_prompts(), _ours(model, _prompts(), FULL_DEPTH["threshold 1.0"]), strict=True):
        expected = _generate(theirs, prompt, model.tokenizer.vocab_size)
        if ours != expected:
            num_different += 1
            assert _margin_where_they_part(theirs, prompt, ours, expected) < MARGIN
    assert num_different <= 1, "such a margin is rare"


@torch.no_grad()
def _margin_where_they_part(theirs: Any, prompt: list[int], ours: list[int], expected: list[int]) -> float:
    same = next(place for place, pair in enumerate(zip(ours, expected, strict=True)) if pair[0] != pair[1])
    first, second = theirs(torch.tensor([[*prompt, *expected[:same]]])).logits[0, -1].topk(2).values
    return float(first - second)


def test_a_text_ends_where_theirs_does(case: Case, cpu: Device, tmp_path: Path) -> None:
    """At a stop token, which is no part of the text; other texts of the batch go on."""
    theirs = _theirs(export_model(case.run, tmp_path / "theirs").folder, torch.float64)
    model = load_model(case.step, case.config, cpu, dtype=torch.float64)
    endless = _generate(theirs, _prompts()[2], model.tokenizer.vocab_size)
    stop = endless[NEW_TOKENS // 2]
    sampling = {"max_new_tokens": NEW_TOKENS, "stop_token_ids": (stop,)}
    texts = texts_of(model, [request(prompt, FULL_DEPTH["threshold 1.0"], **sampling) for prompt in _prompts()])
    for prompt, text in zip(_prompts(), texts, strict=True):
        expected = _generate(theirs, prompt, model.tokenizer.vocab_size, eos_token_id=stop)
        assert tokens_of(text) == expected
        assert text[-1].finish == ("stop" if expected[-1] == stop else "length")
    assert {text[-1].finish for text in texts} == {"stop", "length"}


@pytest.mark.parametrize("layer", EXITS["layers"])
def test_an_exit_is_the_model_that_is_cut_there(case: Case, cpu: Device, tmp_path: Path, layer: int) -> None:
    theirs = _theirs(export_model(case.run, tmp_path / "theirs", exit_layer=layer).folder, torch.float64)
    model = load_model(case.step, case.config, cpu, dtype=torch.float64)
    always = ExitParams(threshold=0.0, exits=(layer,))
    prompts = _prompts()[:3]
    expected = [_generate(theirs, prompt, model.tokenizer.vocab_size) for prompt in prompts]
    assert _ours(model, prompts, always) == expected
    logits_NV = _cached_logits(model, layer, prompts)
    with torch.no_grad():
        for logits_V, prompt in zip(logits_NV, prompts, strict=True):
            expected_V = theirs(torch.tensor([prompt])).logits[0, -1, : model.tokenizer.vocab_size]
            torch.testing.assert_close(logits_V, expected_V, atol=1e-5, rtol=0)  # their angles are of fp32


@torch.inference_mode()
def _cached_logits(model: OpenedModel, layer: int, prompts: list[list[int]]) -> torch.Tensor:
    """At each prompt's last position, fed with a cache: all but the last token first, where there are more."""
    slots = range(len(prompts))
    walk = DepthWalk(model.runner, model.exits, slots=len(prompts), capacity=32, room=32)
    for slot in slots:
        walk.ledger.open(slot, blocks=[layer] if model.runner.attends(layer) else [])
    walk.enter({slot: prompts[slot][:-1] for slot in slots if len(prompts[slot]) > 1}, layer)
    return walk.enter({slot: prompts[slot][-1:] for slot in slots}, layer).ask(list(slots)).logits
