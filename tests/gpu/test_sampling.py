"""Sampling on a GPU: the tokens that the CPU draws, whatever the neighbours are."""

import pytest
import torch
from gpu import sampling_cases
from gpu.conftest import Place


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_are_those_of_the_cpu_alone_or_not(place: Place, dtype: torch.dtype) -> None:
    """Probabilities may differ by a rounding, which no random number here is near."""
    (answers,) = place.run(1, sampling_cases.sampled, dtype)
    assert answers["device"] == answers["cpu"]
    assert answers["alone"] == answers["device"]
