"""Prompts' log-probabilities in tests: what one pass without a cache says of them."""

from collections.abc import Sequence

import pytest

from helpers.decoding import full_logits
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Request, Scores

LogprobsOfRows = list[list[float]]
"""[S][V]"""


def by_one_pass(model: OpenedModel, prompt: Sequence[int]) -> LogprobsOfRows:
    """Of every token after each position, at full depth."""
    logits_SV = full_logits(model.stage, prompt, model.stage.model.num_layers)[:, : model.tokenizer.vocab_size]
    return logits_SV.log_softmax(-1).tolist()


def assert_right(found: Scores, of: Request, expected: LogprobsOfRows) -> None:
    """
    Args:
        expected: see `by_one_pass`.
    """
    top = of.prompt_logprobs
    assert top is not None and len(found.logprobs) == len(of.prompt) - 1
    for logprobs_V, token, own in zip(expected, of.prompt[1:], found.logprobs, strict=False):
        assert own.token == pytest.approx(logprobs_V[token], abs=1e-9)
        assert [*own.top.values()] == pytest.approx(sorted(logprobs_V, reverse=True)[:top], abs=1e-9)
        assert own.top == pytest.approx({other: logprobs_V[other] for other in own.top}, abs=1e-9)
