"""Decoding on one GPU: the cache against the full forward, exits against full depth."""

import pytest
from gpu import cases
from gpu.conftest import Place


def test_cached_logits_equal_the_full_forward(place: Place) -> None:
    (distances,) = place.run(1, cases.cached_logits)
    assert distances == pytest.approx(dict.fromkeys(distances, 0.0), abs=1e-4)


@pytest.mark.parametrize("policy", ["recompute", "fill"])
def test_rows_that_leave_at_mixed_depths_are_caught_up_exactly(place: Place, policy: str) -> None:
    (result,) = place.run(1, cases.decoded_at_mixed_depths, policy)
    assert result["device"] == place.device
    assert {layer for text in result["texts"] for _, layer in text} == {2, 5, 8}, "the case is to mix depths"
    assert result["distance"] <= 1e-4


def test_graphs_change_nothing(place: Place) -> None:
    (result,) = place.run(1, cases.decoded_through_graphs)
    assert result["depths"] == [2, 5, 8], "the case is to mix depths"
    assert result["same"] and result["distance"] <= 1e-4
    assert (result["graphs"] > 0) == (place.device == "cuda")


def test_thresholds_decide_where_tokens_leave(place: Place) -> None:
    (answers,) = place.run(1, cases.generated)
    assert answers["threshold 1"] == answers["full"]
    assert {layer for _, layer in answers["full"]} == {8}
    assert {layer for _, layer in answers["threshold 0"]} == {2}
    assert answers["sampled"] == answers["sampled again"]
