"""Sampled self-speculation, through a batch: texts come as often as full depth's logits say, counted over all texts of
a small vocabulary; and a request's tokens are its own, whoever is beside it.

Shapes: V vocabulary.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.decoding import TinyTokenizer, full_logits, opened, request, served, texts_of, tokens_of
from helpers.drafts import acceptance, drafting, prompts, weaken
from helpers.fits import chi_square
from helpers.models import whole_model
from inference.sampling_requests import draws

from megatron_ee.config import ExitParams
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.sampling import Row, probabilities
from megatron_ee.parallel.mesh import Mesh

VOCAB_SIZE = 4
NUM_TOKENS = 4
PROMPT = (1, 3, 0)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"top_k": 3, "top_p": 0.9, "min_p": 0.05},
    "penalised": {
        "temperature": 0.7,
        "top_p": 0.95,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.6,
        "presence_penalty": -0.3,
        "logit_bias": {1: 0.7, 3: -0.4},
    },
}


@pytest.fixture(scope="module")
def small(mesh: Mesh) -> OpenedModel:
    """Four tokens; the other rows of the output are padding."""
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64)
    weaken(stage, after=5, factor=0.3)
    with torch.no_grad():
        stage.projection_weight(8).mul_(2)
    whole = opened(stage)
    return OpenedModel(stage, TinyTokenizer(VOCAB_SIZE), whole.exits, whole.measures)


def _joint(model: OpenedModel, settings: dict[str, Any]) -> Any:
    """Probabilities of all texts, flattened, from passes without a cache."""
    joint = np.zeros([VOCAB_SIZE] * NUM_TOKENS)
    of = draws(PROMPT, **{"temperature": 1.0, **settings})

    def go_on(text: tuple[int, ...], p: float) -> None:
        if len(text) == NUM_TOKENS:
            joint[text] = p
            return
        logits_1V = full_logits(model.stage, [*PROMPT, *text], 8)[-1:, :VOCAB_SIZE]
        for token, share in enumerate(probabilities(logits_1V, [Row(of, text)])[0].tolist()):
            go_on((*text, token), p * share)

    go_on((), 1.0)
    return joint.ravel()


def _counts(model: OpenedModel, params: ExitParams, settings: dict[str, Any], count: int) -> tuple[Any, float]:
    requests = [
        request(PROMPT, params, max_new_tokens=NUM_TOKENS + 2, seed=seed, **{"temperature": 1.0, **settings})
        for seed in range(count)
    ]
    texts = served(model, requests, 250)
    first = np.array([tokens_of(text)[:NUM_TOKENS] for text in texts])
    numbers = np.ravel_multi_index(first.T, [VOCAB_SIZE] * NUM_TOKENS)
    return np.bincount(numbers, minlength=VOCAB_SIZE**NUM_TOKENS), acceptance(texts)


def _assert_fits(model: OpenedModel, name: str, params: ExitParams, count: int) -> None:
    counts, accepted = _counts(model, params, SETTINGS[name], count)
    assert 0.2 < accepted < 0.98, "the case is to accept and to reject"
    assert chi_square(counts, _joint(model, SETTINGS[name])) > 1e-3
    others = (other for other in SETTINGS if other != name)
    assert all(chi_square(counts, _joint(model, SETTINGS[other])) < 1e-6 for other in others), "the test sees nothing"


@pytest.mark.parametrize("name", ["truncated", "penalised"])
def test_texts_come_as_often_as_full_depth_says(small: OpenedModel, name: str) -> None:
    _assert_fits(small, name, drafting(draft_exit=2, draft_length=3), 600)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "params",
    [
        drafting(draft_exit=2, draft_length=1),
        drafting(draft_exit=5, draft_length=4),
        drafting(draft_exit=2, draft_length=4, draft_threshold=0.4),
        drafting(),
    ],
    ids=["one", "deep", "sure", "auto"],
)
def test_many_texts_come_as_often_as_full_depth_says(small: OpenedModel, name: str, params: ExitParams) -> None:
    _assert_fits(small, name, params, 10_000)


def test_a_request_alone_is_the_same_in_any_batch(random_model: OpenedModel) -> None:
    """Also one that is sampled: its random numbers, its acceptance and its draft lengths are its own."""
    modes = [
        drafting(draft_length=3),
        drafting(),
        ExitParams(mode="full"),
        drafting(draft_exit=5, draft_threshold=0.03),
        ExitParams(threshold=0.03),
    ]
    requests = [
        request(prompt, modes[number % 5], temperature=0.4, top_p=0.9, seed=number, repetition_penalty=1.1)
        for number, prompt in enumerate(prompts(5, 4))
    ]
    alone = [texts_of(random_model, [of])[0] for of in requests]
    said = [[(of.token, of.draft_exit, of.discarded, of.exit_layer) for of in text] for text in alone]
    for order in (requests, requests[::-1]):
        for slots in (2, 5):
            texts = served(random_model, order, slots, prefill_chunk=5)
            texts = texts if order is requests else texts[::-1]
            assert [[(of.token, of.draft_exit, of.discarded, of.exit_layer) for of in text] for text in texts] == said
    assert 0 < acceptance(alone) < 1
    other = [texts_of(random_model, [replace(of, seed=of.seed + 1)])[0] for of in requests]
    assert [tokens_of(text) for text in other] == [tokens_of(text) for text in alone], "sampling's own seed goes first"
    seeds = [
        tokens_of(texts_of(random_model, [request([1, 2], drafting(), temperature=1.0, seed=seed)])[0])
        for seed in (0, 1)
    ]
    assert seeds[0] != seeds[1]
