"""What is no number, at the exit that drafts, at full depth, or at a drafted token alone."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from helpers.decoding import opened, request, texts_of, tokens_of
from helpers.drafts import counting_model, drafting, prompts, weaken
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee import LLM, SamplingParams
from megatron_ee.config import ExitParams
from megatron_ee.errors import UserError
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.sampling import NoTokenError
from megatron_ee.parallel.mesh import Mesh

FULL = ExitParams(mode="full")


def broken_exit(mesh: Mesh, value: float) -> OpenedModel:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, projection=["own", "shared"])
    weaken(stage, after=2, factor=0.4)
    with torch.no_grad():
        stage.projection_weight(2)[7] = value
    return opened(stage)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [0.0, 0.01])
def test_an_exit_that_says_no_number_drafts_nothing_and_moves_no_token(
    mesh: Mesh, random_model: OpenedModel, value: float, threshold: float
) -> None:
    model, asked = broken_exit(mesh, value), prompts(4)
    params = [drafting(draft_exit=layer, draft_length=3, draft_threshold=threshold) for layer in (2, 5, 2, 5)]
    expected = texts_of(model, [request(prompt, FULL) for prompt in asked])
    texts = texts_of(model, [request(prompt, of) for prompt, of in zip(asked, params, strict=True)])
    assert [tokens_of(text) for text in texts] == [tokens_of(text) for text in expected]
    accepted = [sum(of.drafted for of in text) for text in texts]
    assert accepted[1] > 0 and accepted[3] > 0
    sampled = request(asked[0], params[0], temperature=1.0, seed=3)
    assert texts_of(model, [sampled])[0] == texts_of(model, [sampled, *[request(asked[1], params[1])] * 2])[0]
    assert accepted[0] == accepted[2] == 0 and not any(of.drafted for of in texts_of(model, [sampled])[0])


def test_where_full_depth_says_no_number_the_slot_is_named(mesh: Mesh) -> None:
    """The tokens before have come by then, as in plain decoding; whatever is drafted at that point."""
    model = counting_model(mesh)
    with torch.no_grad():
        model.stage.projection_weight(8)[3, 9] = 1e308  # infinite where it meets token 9, and no other
    for params, temperature in product(
        [FULL, *(drafting(draft_length=length) for length in (1, 2, 3, 5))], (0.0, 0.01)
    ):
        batch = Batch(model, slots=3, capacity=64)
        for first in (30, 2, 40):
            batch.add(request([first], params, max_new_tokens=12, temperature=temperature))
        text: list[int] = []
        with pytest.raises(NoTokenError) as raised:
            _collect(batch, 1, text)
        assert raised.value.rows == (1,)
        assert text == list(range(3, 10))
    llm = LLM.of(model, tiny_config())
    with pytest.raises(UserError, match=r"prompts\.1: no token can be chosen"):
        llm.generate([[30], [2], [40]], SamplingParams(max_new_tokens=12), drafting())


def _collect(batch: Batch, slot: int, text: list[int]) -> None:
    """What comes of a sequence before something is wrong."""
    for _ in range(12):
        text += [emission.token for of, emission in batch.step() if of == slot]


def overflowing(mesh: Mesh) -> tuple[OpenedModel, list[Request], list[list[int]]]:
    """A model whose exit drafts tokens, now and then, that full depth does not say, and that make it overflow; and
    requests, and what full depth says."""
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64)
    weaken(stage, after=2, factor=0.4)
    asked = prompts(6, 5)
    requests = [request(prompt, FULL) for prompt in asked]
    expected = [tokens_of(text) for text in texts_of(opened(stage), requests)]
    harmless = {token for prompt in asked for token in prompt} | {token for text in expected for token in text}
    with torch.no_grad():
        assert stage.embedding is not None
        stage.embedding.weight[[token for token in range(VOCAB_SIZE) if token not in harmless]] = math.inf
    return opened(stage), requests, expected


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 1}], ids=["greedy", "sampled"])
def test_what_overflows_at_a_token_that_is_not_accepted_is_gone_with_it(
    mesh: Mesh, length: int, sampling: dict[str, Any]
) -> None:
    """In its own launch it reaches the rows before it, since attention multiplies by 0 what it masks out; these are run
    again without it. No later token and no neighbour sees it."""
    model, requests, expected = overflowing(mesh)
    batch = Batch(model, slots=6, capacity=32)
    for number, of in enumerate(requests):
        params = drafting(draft_exit=2, draft_length=length) if number % 3 else FULL
        batch.add(request(of.prompt, params, **sampling))
    texts: list[list[Emission]] = [[] for _ in requests]
    num_again = 0
    while going := sum(not text or text[-1].finish is None for text in texts):
        before = batch.walk.work.turns
        for slot, emission in batch.step():
            texts[slot].append(emission)
        num_again += batch.walk.work.turns - before - going
        assert all(batch.walk.cache.of(number).isfinite().all() for number in batch.walk.cache.windows)
    assert [tokens_of(text) for text in texts] == expected
    assert num_again > 0 and any(emission.drafted for text in texts for emission in text)
