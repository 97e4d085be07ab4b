"""Greedy self-speculation says what full depth says, token for token: after each of its texts' tokens, one pass without
a cache over the whole text chooses the next one. In fp64 always; in fp32 but for tokens that are as good as equally
likely there.

Shapes: S positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.decoding import full_logits, opened, request, served, tokens_of
from helpers.drafts import acceptance, drafting, prompts, weaken
from helpers.models import whole_model

from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission
from megatron_ee.parallel.mesh import Mesh

EXITS = (2, 5, "auto")
LENGTHS = (1, 3, 6, "auto")
MARGIN = 1e-4
"""Between the likeliest token and the one that came: rounding of fp32 may decide below it."""


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    """Exit 5 is right more often than exit 2; grouped queries, two layers with a window."""
    fields = {"sliding_window": 6, "sliding_window_layers": [2, 7]}
    stage = whole_model(mesh, exits=[2, 5], dtype=request.param, model=fields)
    weaken(stage, after=2, factor=0.3)
    weaken(stage, after=5, factor=0.5)
    return opened(stage)


def check(model: OpenedModel, asked: Sequence[Sequence[int]], texts: Sequence[Sequence[Emission]]) -> tuple[int, int]:
    """How many tokens differ from the likeliest ones, and how many there are."""
    num_different = num_tokens = 0
    for prompt, text in zip(asked, texts, strict=True):
        tokens = tokens_of(text)
        logits_SV = full_logits(model.stage, [*prompt, *tokens], 8)[len(prompt) - 1 : -1]
        behind_S = logits_SV.amax(-1) - logits_SV[torch.arange(len(tokens)), tokens]
        different_S = logits_SV.argmax(-1) != torch.tensor(tokens)
        assert not different_S.any() or (logits_SV.dtype == torch.float32 and behind_S.max() < MARGIN), prompt
        num_different += int(different_S.sum())
        num_tokens += len(tokens)
    return num_different, num_tokens


def sweep(model: OpenedModel, layer: Any, length: Any, slots: int, count: int) -> tuple[int, int, float]:
    """Tokens that are not the likeliest ones, tokens, and acceptance."""
    asked, params = prompts(count, 7), drafting(draft_exit=layer, draft_length=length)
    requests = [request(prompt, params, max_new_tokens=8 + number * 7 % 13) for number, prompt in enumerate(asked)]
    texts = served(model, requests, slots)
    assert [len(text) for text in texts] == [of.sampling.max_new_tokens for of in requests]
    num_different, num_tokens = check(model, asked, texts)
    assert num_different <= num_tokens // 1000 + 1, "such a margin is rare"
    assert 0.2 < acceptance(texts) < 0.9, "the case is to accept and to reject"
    return num_different, num_tokens, acceptance(texts)


@pytest.mark.parametrize("layer", EXITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_token_is_full_depths(model: OpenedModel, layer: Any, length: Any) -> None:
    slots = (1, 4, 16)[(EXITS.index(layer) + LENGTHS.index(length)) % 3]
    sweep(model, layer, length, slots, 8)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 4, 16])
@pytest.mark.parametrize("layer", EXITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_token_of_many_prompts_is_full_depths(model: OpenedModel, layer: Any, length: Any, slots: int) -> None:
    sweep(model, layer, length, slots, 200)
