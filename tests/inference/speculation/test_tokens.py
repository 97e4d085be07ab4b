"""Self-speculation says what full depth says, token for token, whatever is drafted and with whom it shares a batch."""

from typing import Any

import pytest
import torch
from helpers.decoding import decode, opened, request, texts_of, tokens_of
from helpers.drafts import acceptance, drafting, prompts, weaken
from helpers.models import whole_model

from megatron_ee.config import ExitParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Request
from megatron_ee.parallel.mesh import Mesh

FULL = ExitParams(mode="full")


@pytest.fixture(scope="module", params=["norm", "mlp", "block"])
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, head=request.param)
    weaken(stage, after=2, factor=0.4)
    return opened(stage)


@pytest.mark.parametrize("layer", [2, 5, "auto"])
@pytest.mark.parametrize("length", [1, 4, "auto"])
def test_greedy_speculation_is_greedy_full_depth(model: OpenedModel, layer: Any, length: Any) -> None:
    asked = prompts(6)
    params = drafting(draft_exit=layer, draft_length=length)
    texts = texts_of(model, [request(prompt, params) for prompt in asked])
    expected = texts_of(model, [request(prompt, FULL) for prompt in asked])
    assert [tokens_of(text) for text in texts] == [tokens_of(text) for text in expected]
    assert [text[-1].finish for text in texts] == ["length"] * 6
    assert 0.05 < acceptance(texts) < 1, acceptance(texts)


def test_modes_share_a_batch(model: OpenedModel) -> None:
    modes = [
        drafting(draft_exit=2, draft_length=3),
        FULL,
        ExitParams(threshold=0.05, kv_policy="fill"),
        drafting(draft_exit=5, draft_length=2),
        ExitParams(threshold=0.03),
        drafting(),
    ]
    requests = [request(prompt, mode) for prompt, mode in zip(prompts(6, 1), modes, strict=True)]
    alone = [texts_of(model, [of])[0] for of in requests]
    assert [tokens_of(text) for text in texts_of(model, requests)] == [tokens_of(text) for text in alone]
    assert texts_of(model, requests[2:3]) == [alone[2]]


def test_a_draft_is_no_filling(model: OpenedModel) -> None:
    """What a draft leaves at its exit waits for its own verification, also while other groups of rows run."""
    modes = [ExitParams(threshold=0.02), drafting(draft_exit=2, draft_length=3, kv_policy="fill")] * 3
    requests = [request(prompt, mode) for prompt, mode in zip(prompts(6, 2), modes, strict=True)]
    alone = [tokens_of(texts_of(model, [of])[0]) for of in requests]
    for chunk in (2, 3, 512):
        texts = decode(Batch(model, slots=6, capacity=64, prefill_chunk=chunk), requests)
        assert [tokens_of(text) for text in texts] == alone


def test_a_batch_at_full_depth_and_drafts_leaves_the_same_keys_and_values(model: OpenedModel) -> None:
    requests: list[Request] = [request(prompt, drafting(draft_exit=2, draft_length=4)) for prompt in prompts(3)]
    batch = Batch(model, slots=3, capacity=64)
    texts = decode(batch, requests)
    plain = Batch(model, slots=3, capacity=64)
    decode(plain, [request(of.prompt, FULL) for of in requests])
    for slot, of in enumerate(requests):
        length = len(of.prompt) + len(texts[slot]) - 1
        assert batch.walk.ledger.length(slot) == length
        for attention in batch.walk.cache.windows:
            if attention > 8:
                continue
            for ours, theirs in zip(
                batch.walk.cache.read(attention, slot, length),
                plain.walk.cache.read(attention, slot, length),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
            assert not any(part[:, length:].any() for part in batch.walk.cache.read(attention, slot, 64))
