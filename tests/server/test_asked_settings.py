"""What a request says of exits, over what the server has."""

from typing import Any

import pytest

from megatron_ee.config import ExitParams
from megatron_ee.server.protocol.requests import CompletionRequest
from megatron_ee.server.protocol.settings import exit_of

OWN = ExitParams(threshold=1.0, thresholds={2: 0.9, 5: 0.95}, kv_policy="fill")


@pytest.mark.parametrize(
    ("said", "thresholds"),
    [
        (None, {2: 0.9, 5: 0.95}),
        ({"kv_policy": "recompute"}, {2: 0.9, 5: 0.95}),
        ({"threshold": 0.5}, {2: 0.5, 5: 0.5}),
        ({"threshold": None}, {2: 0.9, 5: 0.95}),
        ({"threshold": 0.5, "thresholds": {"5": 0.7}}, {2: 0.5, 5: 0.7}),
        ({"thresholds": {"5": 0.7}}, {5: 0.7}),
    ],
    ids=str,
)
def test_a_threshold_of_a_request_is_for_all_exits(said: dict[str, Any] | None, thresholds: dict[int, float]) -> None:
    """Thresholds of single exits that the server has would leave it without effect."""
    request = CompletionRequest(model="x", prompt="y", early_exit=said)
    assert exit_of(request, OWN).may_fire([2, 5]) == thresholds
