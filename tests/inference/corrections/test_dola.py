"""DoLa, held against its formulas, and each case in which a formula has nothing to say."""

import math
from itertools import pairwise

import pytest
import torch
from helpers.corrections import naive_divergence, naive_dola
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_ee.config import DolaParams
from megatron_ee.inference.corrections import dola
from megatron_ee.inference.sampling.draw import NO_TOKEN, likeliest

INFINITE = [math.nan, math.inf, -math.inf]


def _logits(
    shape: tuple[int, int], exits: int, seed: int, *, spread: float = 3.0, apart: float = 1.0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """fp64 final logits [N, V] and those of exits.

    Args:
        apart: how much exits differ from the final output.
    """
    generator = torch.Generator().manual_seed(seed)
    final_NV = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    noises = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(exits)]
    return final_NV, [final_NV + noise_NV * spread * apart for noise_NV in noises]


def _scale(final_V: torch.Tensor, early: list[torch.Tensor]) -> float:
    return max(1.0, *(float(logits_V.max() - logits_V.min()) for logits_V in (final_V, *early)))


def _is_clear(final_NV: torch.Tensor, early: list[torch.Tensor], params: DolaParams, *, within: float) -> bool:
    """Whether neither a row's exit nor what is ruled out there is a matter of rounding."""
    for row, final_V in enumerate(final_NV):
        of_row = [exit_NV[row] for exit_NV in early]
        margin = within * _scale(final_V, of_row)
        divergences = sorted(naive_divergence(final_V, exit_V) for exit_V in of_row)
        distances_V = (final_V - final_V.max() - math.log(params.relative_top or 1)).abs()
        if any(larger - smaller < margin for smaller, larger in pairwise(divergences)):
            return False
        if ((distances_V > 0) & (distances_V < margin)).any():
            return False
    return True


def _assert_as_written(final_NV: torch.Tensor, early: list[torch.Tensor], params: DolaParams, *, within: float) -> None:
    """Within so much of the range of the logits."""
    found_NV = dola(final_NV, early, params)
    assert found_NV.dtype == torch.promote_types(final_NV.dtype, torch.float32)
    for row, found_V in enumerate(found_NV):
        of_row = [exit_NV[row] for exit_NV in early]
        expected = naive_dola(final_NV[row], of_row, params)
        assert found_V.tolist() == pytest.approx(expected, rel=0, abs=within * _scale(final_NV[row], of_row))


CASES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 3), st.integers(1, 24)),
        "exits": st.integers(1, 3),
        "seed": st.integers(0, 10**6),
        "spread": st.sampled_from([0.1, 1.0, 4.0, 20.0]),
        "apart": st.sampled_from([0.03, 0.3, 1.0, 3.0]),
    }
)
SETTINGS = st.builds(
    DolaParams,
    relative_top=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    lower_bound=st.sampled_from([-1000.0, -30.0, 0.0]),
)


@settings(max_examples=150)
@given(CASES, SETTINGS)
def test_in_fp64_it_is_the_formula(case: dict, params: DolaParams) -> None:
    final_NV, early = _logits(**case)
    assume(_is_clear(final_NV, early, params, within=1e-13))
    _assert_as_written(final_NV, early, params, within=1e-13)


@settings(max_examples=150)
@given(CASES, SETTINGS)
def test_in_fp32_it_is_the_formula(case: dict, params: DolaParams) -> None:
    final_NV, early = _logits(**case)
    final_NV, early = final_NV.float(), [exit_NV.float() for exit_NV in early]
    assume(_is_clear(final_NV, early, params, within=1e-6))
    _assert_as_written(final_NV, early, params, within=1e-6)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_a_vocabulary_of_thousands(dtype: torch.dtype, within: float) -> None:
    final_NV, early = _logits((1, 2000), 2, seed=0)
    final_NV, early = final_NV.to(dtype), [exit_NV.to(dtype) for exit_NV in early]
    assert _is_clear(final_NV, early, DolaParams(), within=within)
    _assert_as_written(final_NV, early, DolaParams(), within=within)


def test_each_row_has_an_exit_of_its_own() -> None:
    """The first exit differs more where rows are averaged, the second one in the last row."""
    final_NV = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    near_V, far_V = final_NV[0] + torch.tensor([0.5, 0.0, 0.0]), final_NV[0] + torch.tensor([-6.0, 0.0, 3.0])
    first_NV, second_NV = torch.stack([far_V, far_V, near_V]), torch.stack([near_V, near_V, far_V])
    of_first, of_second = (
        [naive_divergence(final_V, exit_V) for final_V, exit_V in zip(final_NV, exit_NV, strict=True)]
        for exit_NV in (first_NV, second_NV)
    )
    assert sum(of_first) > sum(of_second) and of_first[2] < of_second[2], "the case is to be one of two minds"
    found_NV = dola(final_NV, [first_NV, second_NV], DolaParams(relative_top=0.0))
    torch.testing.assert_close(found_NV, final_NV.log_softmax(-1) - far_V.log_softmax(-1))


def test_of_exits_that_differ_alike_it_is_the_shallowest() -> None:
    """Contrasts with two mirror images of each other, which are as far from what lies between them."""
    final_NV = torch.zeros(1, 2, dtype=torch.float64)
    left_NV, right_NV = torch.tensor([[1.0, -1.0]]).double(), torch.tensor([[-1.0, 1.0]]).double()
    for first_NV, second_NV in ((left_NV, right_NV), (right_NV, left_NV)):
        found_NV = dola(final_NV, [first_NV, second_NV], DolaParams())
        torch.testing.assert_close(found_NV, math.log(0.5) - first_NV.log_softmax(-1))


@pytest.mark.parametrize(("relative_top", "left"), [(0.0, 6), (0.001, 4), (0.1, 3), (0.5, 2), (1.0, 2)])
def test_what_is_unlikely_is_ruled_out(relative_top: float, left: int) -> None:
    final_NV = torch.tensor([[0.01, 0.4, 0.05, 0.4, 0.0001, 0.0001]]).log()
    found_V = dola(final_NV, [torch.zeros(1, 6)], DolaParams(relative_top=relative_top))[0]
    assert (found_V > -900).sum() == left
    assert (found_V[final_NV[0].argsort(descending=True)[left:]] == -1000).all()


def test_an_exit_that_is_the_final_output_adds_nothing() -> None:
    """All that is likely enough is then alike; another exit is preferred."""
    final_NV, (other_NV,) = _logits((3, 9), 1, seed=1)
    found_NV = dola(final_NV, [final_NV.clone()], DolaParams())
    assert set(found_NV.flatten().tolist()) == {0.0, -1000.0}
    found_NV = dola(final_NV, [final_NV, other_NV, final_NV], DolaParams())
    assert torch.equal(found_NV, dola(final_NV, [other_NV], DolaParams()))


@pytest.mark.parametrize("wrong", INFINITE)
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_final_row_that_allows_no_choice_still_does(wrong: float, everywhere: bool) -> None:
    final_NV, early = _logits((3, 20), 2, seed=8)
    params = DolaParams(lower_bound=3.0)
    expected_NV = dola(final_NV, early, params)
    final_NV[1, slice(None) if everywhere else final_NV[1].argmin()] = wrong
    found_NV = dola(final_NV, early, params)
    assert torch.equal(found_NV[[0, 2]], expected_NV[[0, 2]])
    if everywhere or wrong != -math.inf:
        assert likeliest(found_NV)[1] == NO_TOKEN
    else:  # one token is ruled out; no exit can be held beside such logits
        assert torch.equal(found_NV[1], dola(final_NV[[1]], [], params)[0])
        assert likeliest(dola(final_NV, early, DolaParams(relative_top=0.0)))[1] == final_NV[1].argmax()


@pytest.mark.parametrize("wrong", INFINITE)
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_exit_that_is_not_finite_is_not_chosen(wrong: float, everywhere: bool) -> None:
    final_NV, early = _logits((3, 20), 3, seed=9)
    expected_NV, without_NV = (dola(final_NV, exits, DolaParams()) for exits in (early, [early[0], early[2]]))
    for exit_NV in (early[1], wrong_NV := final_NV.clone()):
        exit_NV[1, slice(None) if everywhere else 7] = wrong
    found_NV = dola(final_NV, early, DolaParams())
    assert torch.equal(found_NV[[0, 2]], expected_NV[[0, 2]])
    assert torch.equal(found_NV[1], without_NV[1])
    alone_V, log_p_V = dola(final_NV, [wrong_NV], DolaParams())[1], final_NV[1].log_softmax(-1)
    assert torch.equal(alone_V, torch.where(log_p_V < log_p_V.max() + math.log(0.1), -1000, log_p_V))


def test_half_precision_is_corrected_in_fp32() -> None:
    final_NV, early = _logits((3, 30), 2, seed=10)
    halves = [logits_NV.bfloat16() for logits_NV in (final_NV, *early)]
    found_NV = dola(halves[0], halves[1:], DolaParams())
    singles = [logits_NV.float() for logits_NV in halves]
    assert found_NV.dtype == torch.float32
    assert torch.equal(found_NV, dola(singles[0], singles[1:], DolaParams()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_alone_is_the_row_in_a_batch(dtype: torch.dtype) -> None:
    """But for rounding: where torch has several threads, it sums up a row that is alone in parts."""
    final_NV, early = _logits((7, 5000), 3, seed=11)
    final_NV, early = final_NV.to(dtype), [exit_NV.to(dtype) for exit_NV in early]
    together_NV = dola(final_NV, early, DolaParams())
    for row in range(7):
        alone_NV = dola(final_NV[[row]], [exit_NV[[row]] for exit_NV in early], DolaParams())
        torch.testing.assert_close(alone_NV[0], together_NV[row], rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_what_it_is_given_stays() -> None:
    given = _logits((3, 30), 2, seed=12)
    final_NV, early = _logits((3, 30), 2, seed=12)
    dola(final_NV, early, DolaParams())
    assert torch.equal(final_NV, given[0]) and all(map(torch.equal, early, given[1]))
