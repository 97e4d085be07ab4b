"""When an exit fires."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitParams
from megatron_ee.inference.policies import fires, max_probability, thresholds_of
from megatron_ee.inference.sampling import sample


@pytest.mark.parametrize(
    ("confidence", "threshold", "expected"),
    [
        (0.9, 0.9, True),
        (0.89, 0.9, False),
        (1.0, 1.0, False),  # a half-precision softmax rounds to 1
        (0.0, 0.0, True),
        (math.nan, 0.0, False),
        (math.nan, 0.9, False),
    ],
)
def test_an_exit_fires_at_its_threshold(confidence: float, threshold: float, expected: bool) -> None:
    assert fires(confidence, threshold) is expected


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20))
def test_confidence_is_a_probability(logits: list[float]) -> None:
    assert 1 / len(logits) - 1e-6 <= max_probability(torch.tensor(logits)) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (ExitParams(), {2: 0.9, 5: 0.9}),
        (ExitParams(mode="full"), {}),
        (ExitParams(threshold=1.0), {}),
        (ExitParams(threshold=0.5, min_exit=3), {5: 0.5}),
        (ExitParams(exits=(2,)), {2: 0.9}),
        (ExitParams(exits=()), {}),
        (ExitParams(thresholds={5: 0.4}), {2: 0.9, 5: 0.4}),
        (ExitParams(threshold=1.0, thresholds={5: 0.4}), {5: 0.4}),
    ],
)
def test_which_exits_may_fire(params: ExitParams, expected: dict[int, float]) -> None:
    assert thresholds_of(params, [2, 5]) == expected


def test_sampling() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, temperature=0, top_k=0, generator=generator) == 1
    drawn = [sample(logits, temperature=1.0, top_k=2, generator=generator) for _ in range(300)]
    assert set(drawn) == {1, 3}
    assert drawn.count(1) / 300 == pytest.approx(1 / (1 + math.exp(-1)), abs=0.08)
    assert len({sample(logits, temperature=5.0, top_k=0, generator=generator) for _ in range(200)}) == 4
