"""How the bench judges texts, by hand."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from bench_decode_exits import Judge

NEXT = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
"""Probabilities of the next token, by the token before it."""


class _Bigram:
    def __init__(self) -> None:
        self.heard: list[tuple[int, ...]] = []

    def full_depth_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        self.heard.append(tuple(tokens))
        return NEXT[list(tokens)].log() + 7.0  # logits are no probabilities


def _said(*tokens: int) -> list[Any]:
    return [SimpleNamespace(token=token) for token in tokens]


def test_a_text_is_judged_by_full_depth_given_the_same_text() -> None:
    model = _Bigram()
    prompts: Any = SimpleNamespace(of_round=lambda number, count: [(0, 2), (1,)][:count])
    decoding: Any = SimpleNamespace(said={0: [_said(0, 1), _said(1, 1)], 1: [_said(0, 0)]})
    judge = Judge(model, prompts)  # type: ignore[arg-type]
    agreement, loss = judge.of(decoding)
    # after 2: 0 (likeliest), after 0: 1; after 1: 1 and 1 (likeliest); after 2: 0, after 0: 0 (both likeliest)
    assert agreement == pytest.approx(5 / 6)
    assert loss == pytest.approx(-sum(map(math.log, (0.6, 0.3, 0.8, 0.8, 0.6, 0.5))) / 6, rel=1e-6)
    judge.of(decoding)
    assert len(model.heard) == 3, "each text is read once"
