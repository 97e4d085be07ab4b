"""SLED, held against its formulas: any shapes and settings, distributions of any sharpness, and each case in which a
formula has nothing to say."""

import math

import pytest
import torch
from helpers.corrections import naive_sled
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ee.config import SledParams
from megatron_ee.inference.corrections import sled
from megatron_ee.inference.sampling.draw import NO_TOKEN, likeliest

INFINITE = [math.nan, math.inf, -math.inf]


def _logits(
    shape: tuple[int, int], exits: int, seed: int, *, spread: float = 4.0, peak: float = 0.0, whole: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """fp64 final logits [N, V] and those of exits.

    Args:
        peak: how far one token of each row of an exit, which the final output may not favour, is above the others.
        whole: integers, so that many are equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        logits_NV = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        return logits_NV.round() if whole else logits_NV

    final_NV, early = draw(), [draw() for _ in range(exits)]
    for exit_NV in early:
        tokens_N1 = torch.randint(shape[1], (shape[0], 1), generator=generator)
        exit_NV.scatter_add_(-1, tokens_N1, torch.full_like(tokens_N1, 1, dtype=torch.float64) * peak)
    return final_NV, early


def _assert_as_written(final_NV: torch.Tensor, early: list[torch.Tensor], params: SledParams, *, within: float) -> None:
    """Within so much of the largest of: logits of the row, how far they may move, 1."""
    found_NV = sled(final_NV, early, params)
    assert found_NV.dtype == torch.promote_types(final_NV.dtype, torch.float32)
    for row, found_V in enumerate(found_NV):
        expected = naive_sled(final_NV[row], [exit_NV[row] for exit_NV in early], params)
        scale = max(1.0, final_NV[row].abs().max().item(), params.alpha * params.steps)
        assert found_V.tolist() == pytest.approx(expected, rel=0, abs=within * scale)


CASES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 3), st.integers(1, 24)),
        "exits": st.integers(0, 3),
        "seed": st.integers(0, 10**6),
        "spread": st.sampled_from([0.1, 1.0, 4.0, 20.0]),
        "peak": st.sampled_from([0.0, 0.0, 5.0, 20.0, 60.0, 800.0]),
        "whole": st.booleans(),
    }
)
SETTINGS = st.builds(
    SledParams,
    alpha=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    top_k=st.integers(1, 30),
    steps=st.integers(1, 4),
    lower_bound=st.sampled_from([-1000.0, -30.0, 0.0]),
)


@settings(max_examples=150)
@given(CASES, SETTINGS)
@example({"shape": (2, 9), "exits": 2, "seed": 1, "whole": True, "spread": 1.0}, SledParams(top_k=4))
def test_in_fp64_it_is_the_formula(case: dict, params: SledParams) -> None:
    final_NV, early = _logits(**case)
    _assert_as_written(final_NV, early, params, within=1e-12)


@settings(max_examples=150)
@given(CASES, SETTINGS)
def test_in_fp32_it_is_the_formula(case: dict, params: SledParams) -> None:
    final_NV, early = _logits(**case)
    _assert_as_written(final_NV.float(), [exit_NV.float() for exit_NV in early], params, within=2e-6)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_a_vocabulary_of_thousands(dtype: torch.dtype, within: float) -> None:
    final_NV, early = _logits((1, 3000), 2, seed=3, peak=12.0)
    early = [(final_NV + exit_NV / 4).to(dtype) for exit_NV in early]
    _assert_as_written(final_NV.to(dtype), early, SledParams(top_k=6), within=within)


def test_latent_and_update_are_the_papers_gradients() -> None:
    """Exit n would have learnt token i along the gradient of its cross-entropy, and the final logits move against that
    of KL(P || softmax(z)): both by automatic differentiation."""
    final_NV, early = _logits((1, 12), 3, seed=4)
    m_V = torch.zeros(12, dtype=torch.float64)
    for exit_NV in early:
        for token in final_NV[0].topk(5).indices:
            z_V = exit_NV[0].clone().requires_grad_()
            (gradient_V,) = torch.autograd.grad(-z_V.log_softmax(0)[token], z_V)
            cosine = torch.cosine_similarity(exit_NV[0] - final_NV[0], gradient_V, dim=0)
            m_V[token] += cosine.clamp(min=0) ** 2
    z_V = final_NV[0].clone().requires_grad_()
    latent_V = m_V / m_V.sum()
    divergence = torch.nn.functional.kl_div(z_V.log_softmax(0), latent_V, reduction="sum")
    (gradient_V,) = torch.autograd.grad(divergence, z_V)
    found_V = sled(final_NV, early, SledParams(alpha=0.7, top_k=5))[0]
    race_V = final_NV[0] >= final_NV[0].topk(5).values[-1]
    torch.testing.assert_close(found_V[race_V], (final_NV[0] - 0.7 * gradient_V)[race_V])
    assert (found_V[~race_V] == -1000).all()


def test_alpha_0_leaves_the_race_as_it_is() -> None:
    final_NV, early = _logits((5, 40), 3, seed=5)
    found_NV = sled(final_NV, early, SledParams(alpha=0.0, top_k=4))
    assert found_NV.argmax(-1).tolist() == final_NV.argmax(-1).tolist()
    is_in_race_NV = found_NV != -1000
    assert is_in_race_NV.sum(-1).tolist() == [4] * 5
    assert torch.equal(found_NV[is_in_race_NV], final_NV[is_in_race_NV])


@pytest.mark.parametrize("top_k", [40, 41, 1000])
def test_a_race_of_the_whole_vocabulary_has_no_lower_bound(top_k: int) -> None:
    final_NV, early = _logits((3, 40), 2, seed=6)
    found_NV = sled(final_NV, early, SledParams(top_k=top_k))
    assert found_NV.min() > -100 and not torch.equal(found_NV, final_NV)
    assert torch.equal(found_NV, sled(final_NV, early, SledParams(top_k=40)))


def test_an_exit_that_agrees_says_nothing() -> None:
    """Logits that are the final ones, or the final ones and a constant, have no direction towards any token."""
    final_NV, early = _logits((4, 16), 2, seed=7, whole=True)
    stays_NV = sled(final_NV, [], SledParams(top_k=3))
    assert torch.equal(stays_NV, torch.where(stays_NV == -1000, -1000, final_NV))
    for agreeing_NV in (final_NV, final_NV + 2, final_NV - 0.5):
        assert torch.equal(sled(final_NV, [agreeing_NV], SledParams(top_k=3)), stays_NV)
        with_others_NV = sled(final_NV, [early[0], agreeing_NV, early[1]], SledParams(top_k=3))
        assert torch.equal(with_others_NV, sled(final_NV, early, SledParams(top_k=3)))


def test_a_row_whose_race_no_exit_supports_stays() -> None:
    """The exit was for token 0 by more than the final output is: its logits moved away from it."""
    final_NV = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    exit_NV = torch.tensor([[9.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    away_V, towards_V = sled(final_NV, [exit_NV], SledParams(top_k=1, alpha=1.0))
    assert away_V.tolist() == [3.0, -1000.0, -1000.0]
    assert towards_V.tolist() == pytest.approx([3 + 1 - final_NV[1].softmax(-1)[0].item(), -1000, -1000])


def test_tokens_equal_at_the_border_stay_together() -> None:
    final_NV = torch.tensor([[5.0, 4.0, 4.0, 4.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    exit_NV = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found_NV = sled(final_NV, [exit_NV], SledParams(top_k=2))
    assert (found_NV > -100).sum(-1).tolist() == [4, 2, 5]
    for row in range(3):
        torch.testing.assert_close(found_NV[row], sled(final_NV[[row]], [exit_NV[[row]]], SledParams(top_k=2))[0])


@pytest.mark.parametrize("wrong", INFINITE)
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("top_k", [2, 50])
def test_a_final_row_that_allows_no_choice_still_does(wrong: float, everywhere: bool, top_k: int) -> None:
    final_NV, early = _logits((3, 20), 2, seed=8)
    params = SledParams(top_k=top_k, lower_bound=3.0, steps=2)
    expected_NV = sled(final_NV, early, params)
    final_NV[1, slice(None) if everywhere else 7] = wrong
    found_NV = sled(final_NV, early, params)
    assert torch.equal(found_NV[[0, 2]], expected_NV[[0, 2]])
    if everywhere or wrong != -math.inf:
        assert likeliest(found_NV)[1] == NO_TOKEN
    else:  # one token is ruled out; no exit can be held beside such logits
        assert torch.equal(found_NV, torch.cat([found_NV[:1], sled(final_NV[[1]], [], params), found_NV[2:]]))
        assert found_NV[1].isfinite().all() == (top_k == 2)


@pytest.mark.parametrize("wrong", INFINITE)
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_exit_that_is_not_finite_says_nothing_there(wrong: float, everywhere: bool) -> None:
    final_NV, early = _logits((3, 20), 3, seed=9)
    expected_NV, without_NV = (sled(final_NV, exits, SledParams()) for exits in (early, [early[0], early[2]]))
    early[1][1, slice(None) if everywhere else 7] = wrong
    found_NV = sled(final_NV, early, SledParams())
    assert torch.equal(found_NV[[0, 2]], expected_NV[[0, 2]])
    assert torch.equal(found_NV[1], without_NV[1])


def test_a_vocabulary_of_one_token() -> None:
    final_NV = torch.tensor([[3.0], [-2.0]])
    assert torch.equal(sled(final_NV, [torch.tensor([[1.0], [-2.0]])], SledParams()), final_NV)


def test_half_precision_is_corrected_in_fp32() -> None:
    final_NV, early = _logits((3, 30), 2, seed=10)
    halves = [logits_NV.bfloat16() for logits_NV in (final_NV, *early)]
    found_NV = sled(halves[0], halves[1:], SledParams())
    singles = [logits_NV.float() for logits_NV in halves]
    assert found_NV.dtype == torch.float32
    assert torch.equal(found_NV, sled(singles[0], singles[1:], SledParams()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_alone_is_the_row_in_a_batch(dtype: torch.dtype) -> None:
    """But for rounding: where torch has several threads, it sums up a row that is alone in parts."""
    final_NV, early = _logits((7, 5000), 3, seed=11)
    final_NV, early = final_NV.to(dtype), [exit_NV.to(dtype) for exit_NV in early]
    params = SledParams(top_k=20, steps=2)
    together_NV = sled(final_NV, early, params)
    for row in range(7):
        alone_NV = sled(final_NV[[row]], [exit_NV[[row]] for exit_NV in early], params)
        torch.testing.assert_close(alone_NV[0], together_NV[row], rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_what_it_is_given_stays() -> None:
    given = _logits((3, 30), 2, seed=12)
    final_NV, early = _logits((3, 30), 2, seed=12)
    sled(final_NV, early, SledParams(steps=3))
    assert torch.equal(final_NV, given[0]) and all(map(torch.equal, early, given[1]))
