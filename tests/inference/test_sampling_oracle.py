"""The distribution of a token against transformers' processors and warpers, chained in the order that is promised."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.sampling_requests import CASES, VOCAB_SIZE, draws_of

from megatron_ee.inference.sampling import Draws, Row, probabilities

transformers = pytest.importorskip("transformers")


def _penalised(logits_1V: torch.Tensor, of: Draws) -> torch.Tensor:
    """transformers has no penalties of the answer alone."""
    counts_V = torch.bincount(torch.tensor(of.answer, dtype=torch.long), minlength=VOCAB_SIZE).double()
    return logits_1V - of.params.frequency_penalty * counts_V - of.params.presence_penalty * (counts_V > 0).double()


def _theirs(logits_V: torch.Tensor, of: Draws) -> torch.Tensor:
    params, stops = of.params, list(of.request.stops)
    ids_1S = torch.tensor([[*of.request.prompt, *of.answer]])
    steps: list[Any] = []
    if params.logit_bias:
        bias = {(token,): value for token, value in params.logit_bias.items()}
        steps.append(transformers.SequenceBiasLogitsProcessor(bias))
    steps.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(lambda _ids, logits_1V: _penalised(logits_1V, of))
    if stops and params.min_new_tokens:
        least = transformers.MinNewTokensLengthLogitsProcessor(len(of.request.prompt), params.min_new_tokens, stops)
        steps.append(least)
    if params.temperature:
        steps.append(transformers.TemperatureLogitsWarper(params.temperature))
        steps.append(transformers.MinPLogitsWarper(params.min_p))
        if params.top_k:
            steps.append(transformers.TopKLogitsWarper(params.top_k))
        steps.append(transformers.TopPLogitsWarper(params.top_p))
    logits_1V = logits_V[None]
    for step in steps:
        logits_1V = step(ids_1S, logits_1V)
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits_1V[0].argmax(), VOCAB_SIZE).double()
    return logits_1V[0].softmax(-1)


@given(st.lists(CASES, min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=150)
def test_a_batch_of_any_requests_is_distributed_as_by_transformers(cases: list[dict[str, Any]], seed: int) -> None:
    logits_NV = torch.randn(len(cases), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)).double() * 3
    of = [draws_of(case) for case in cases]
    ours_NV = probabilities(logits_NV, [Row(draws) for draws in of])
    theirs_NV = torch.stack([_theirs(logits_V, draws) for logits_V, draws in zip(logits_NV, of, strict=True)])
    torch.testing.assert_close(ours_NV, theirs_NV, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_a_nucleus_of_any_size_in_a_large_vocabulary(scale: float, top_p: float) -> None:
    """Few candidates are enough for some rows, and for others all have to be sorted."""
    logits_NV = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    logits_NV[1] *= 4
    of = draws_of({"settings": {"temperature": 1.0, "top_p": top_p}, "prompt": [1], "answer": []})
    theirs_NV = transformers.TopPLogitsWarper(top_p)(None, logits_NV).softmax(-1)
    torch.testing.assert_close(probabilities(logits_NV, [Row(of)] * 4), theirs_NV, rtol=1e-9, atol=1e-12)
