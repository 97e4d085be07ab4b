"""Decoding on one GPU: the cache against the full forward, exits against full depth."""

import pytest
from gpu import cases
from gpu.conftest import Place


def test_cached_logits_equal_the_full_forward(place: Place) -> None:
    (result,) = place.run(1, cases.decoding)
    assert result["chunks"] == pytest.approx(dict.fromkeys(result["chunks"], 0.0), abs=1e-4)
    assert result["mixed"] <= 1e-4
    assert set(result["depths"]) == {2, 5, 8}, "the case is to mix depths"


def test_thresholds_decide_where_tokens_leave(place: Place) -> None:
    (answers,) = place.run(1, cases.generated)
    assert answers["threshold 1"] == answers["full"]
    assert {layer for _, layer in answers["full"]} == {8}
    assert {layer for _, layer in answers["threshold 0"]} == {2}
    assert answers["sampled"] == answers["sampled again"]
