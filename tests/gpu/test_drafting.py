"""Self-speculation on one GPU: full depth's tokens, through graphs or not."""

from gpu import drafting_cases
from gpu.conftest import Place


def test_drafts_move_no_token(place: Place) -> None:
    (result,) = place.run(1, drafting_cases.drafted)
    assert result["same"] and result["behind"] < 1e-4
    assert 0.1 < result["acceptance"] < 1
    assert result["left"] == 0, "what is taken back is cleared"
    assert (result["graphs"] > 0) == (place.device == "cuda")
