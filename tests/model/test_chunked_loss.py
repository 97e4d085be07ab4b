"""The loss by chunks equals the plain one over whole logits: values, every gradient, and over two ranks."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ee.model.chunked_loss import ProjectedLoss, projected_loss
from megatron_ee.model.split_vocabulary import likeliest_tokens, token_losses
from megatron_ee.parallel.mesh import Mesh

S, B, H, V = 5, 3, 8, 48
CHUNK_ROWS = [1, 2, 4, 7, 15, 100]


class Case(NamedTuple):
    features_SBH: torch.Tensor
    weight_VH: torch.Tensor
    labels_SB: torch.Tensor
    mask_SB: torch.Tensor

    def leaves(self, features: bool = True, weight: bool = True) -> "Case":
        """Fresh inputs that want gradients, or not."""
        return self._replace(
            features_SBH=self.features_SBH.detach().clone().requires_grad_(features),
            weight_VH=self.weight_VH.detach().clone().requires_grad_(weight),
        )


def _case(
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, int, int, int] = (S, B, H, V),
    seed: int = 0,
    keep: float = 0.7,
) -> Case:
    """Random inputs, with the likeliest token as the label in about half of the rows."""
    positions, sequences, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)
    features_SBH = torch.randn(positions, sequences, hidden, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    random_SB = torch.randint(vocabulary, (positions, sequences), generator=generator)
    right_SB = torch.rand(positions, sequences, generator=generator) < 0.5
    labels_SB = torch.where(right_SB, (features_SBH @ weight_VH.T).argmax(-1), random_SB)
    mask_SB = (torch.rand(positions, sequences, generator=generator) < keep).float()
    return Case(features_SBH.to(dtype), weight_VH.to(dtype), labels_SB, mask_SB)


def _plain(case: Case, group: dist.ProcessGroup, scale: float) -> ProjectedLoss:
    """The specification; `token_losses` takes fp32, so that fp64 has its own cross-entropy."""
    logits_SBV = case.features_SBH @ case.weight_VH.T
    if logits_SBV.dtype == torch.float64:
        losses_SB = -logits_SBV.log_softmax(-1).gather(-1, case.labels_SB[..., None])[..., 0]
    else:
        losses_SB = token_losses(logits_SBV, case.labels_SB, group)
    likeliest_SB = likeliest_tokens(logits_SBV, group)
    correct_SB = likeliest_SB == case.labels_SB
    cross_entropy = (losses_SB * case.mask_SB).sum()
    return ProjectedLoss(cross_entropy * scale, cross_entropy.detach(), (correct_SB * case.mask_SB).sum(), likeliest_SB)


def _check(case: Case, mesh: Mesh, chunk_rows: int, tolerance: float, scale: float = 0.3) -> None:
    plain, chunked = case.leaves(), case.leaves()
    expected = _plain(plain, mesh.groups.tp, scale)
    loss = projected_loss(*chunked, mesh.groups.tp, scale=scale, chunk_rows=chunk_rows)
    for value, wanted in zip(loss[:3], expected[:3], strict=True):
        torch.testing.assert_close(value.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    assert loss.correct == expected.correct
    assert torch.equal(loss.likeliest_SB, expected.likeliest_SB)
    assert loss.objective.dtype == torch.promote_types(case.features_SBH.dtype, torch.float32)
    (expected.objective * 2.5).backward()
    (loss.objective * 2.5).backward()
    for mine, wanted in zip(chunked[:2], plain[:2], strict=True):
        assert mine.grad is not None and wanted.grad is not None and mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("chunk_rows", CHUNK_ROWS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
    ids=str,
)
def test_equals_the_plain_version(dtype: torch.dtype, tolerance: float, chunk_rows: int, mesh: Mesh) -> None:
    _check(_case(dtype), mesh, chunk_rows, tolerance)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 70)),
    chunk_rows=st.integers(1, 30),
    keep=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_version_at_any_shape(
    shape: tuple[int, int, int, int], chunk_rows: int, keep: float, seed: int, mesh: Mesh
) -> None:
    _check(_case(shape=shape, seed=seed, keep=keep), mesh, chunk_rows, 1e-12)


def test_no_rows_at_all(mesh: Mesh) -> None:
    case = _case(shape=(0, 3, H, V)).leaves()
    loss = projected_loss(*case, mesh.groups.tp, chunk_rows=4)
    loss.objective.backward()
    assert loss.objective == 0 and case.weight_VH.grad is not None and not case.weight_VH.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_masked_rows_count_for_nothing(dtype: torch.dtype, mesh: Mesh) -> None:
    """Neither what they hold nor what their label is: to the last bit."""
    case = _case(dtype)
    masked_SB = case.mask_SB == 0
    assert 0 < masked_SB.sum() < masked_SB.numel()
    garbage = case._replace(
        features_SBH=torch.where(masked_SB[..., None], case.features_SBH * 500, case.features_SBH),
        labels_SB=torch.where(masked_SB, -100, case.labels_SB),
    )
    clean, dirty = case.leaves(), garbage.leaves()
    losses = [projected_loss(*inputs, mesh.groups.tp, chunk_rows=4) for inputs in (clean, dirty)]
    assert all(map(torch.equal, *(loss[:3] for loss in losses)))
    for loss in losses:
        loss.objective.backward()
    assert dirty.features_SBH.grad is not None and not dirty.features_SBH.grad[masked_SB].any()
    torch.testing.assert_close(dirty.features_SBH.grad, clean.features_SBH.grad, rtol=0, atol=0)
    torch.testing.assert_close(dirty.weight_VH.grad, clean.weight_VH.grad, rtol=0, atol=0)


@pytest.mark.parametrize(("features", "weight"), [(True, False), (False, True)])
def test_frozen_inputs_get_no_gradient(features: bool, weight: bool, mesh: Mesh) -> None:
    case, full = _case().leaves(features, weight), _case().leaves()
    for inputs in (case, full):
        projected_loss(*inputs, mesh.groups.tp, chunk_rows=4).objective.backward()
    for mine, wanted, learns in zip(case[:2], full[:2], (features, weight), strict=True):
        assert mine.grad is None if not learns else torch.equal(mine.grad, wanted.grad)


def test_only_the_objective_has_a_gradient(mesh: Mesh) -> None:
    loss = projected_loss(*_case().leaves(), mesh.groups.tp, chunk_rows=4)
    assert [value.requires_grad for value in loss] == [True, False, False, False]
    frozen = projected_loss(*_case(), mesh.groups.tp, chunk_rows=4)
    assert not frozen.objective.requires_grad


def test_small_gradients_survive_half_precision(mesh: Mesh) -> None:
    """Thousands of equally likely tokens, a million rows to divide by, and a loss scale that makes up for both."""
    weight_VH, scale = torch.zeros(4096, H, dtype=torch.float16), 2.0**-20
    case = _case(torch.float16)._replace(weight_VH=weight_VH, labels_SB=torch.zeros(S, B, dtype=torch.int64))
    gradients = []
    for loss_scale in (1.0, 2.0**24):
        leaves = case.leaves()
        projected_loss(*leaves, mesh.groups.tp, scale=scale * loss_scale, chunk_rows=4).objective.backward()
        assert leaves.weight_VH.grad is not None
        gradients.append(leaves.weight_VH.grad.double() / loss_scale)
    exact = case._replace(features_SBH=case.features_SBH.double(), weight_VH=weight_VH.double()).leaves()
    projected_loss(*exact, mesh.groups.tp, scale=scale, chunk_rows=4).objective.backward()
    assert not gradients[0][1:].any()
    torch.testing.assert_close(gradients[1], exact.weight_VH.grad, rtol=0.01, atol=1e-12)


def test_backward_runs_once(mesh: Mesh) -> None:
    case = _case().leaves()
    loss = projected_loss(*case, mesh.groups.tp, chunk_rows=4)
    loss.objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.objective.backward()
    loss = projected_loss(*case, mesh.groups.tp, chunk_rows=4)
    factor = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss.objective * factor, case.weight_VH, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, views of the inputs aside."""

    def __init__(self, inputs: Case) -> None:
        super().__init__()
        self.numel = 0
        self._inputs = {value.untyped_storage().data_ptr() for value in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self._inputs:
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_all_rows_never_exist(dtype: torch.dtype, mesh: Mesh) -> None:
    case = _case(dtype, shape=(32, 4, H, 96)).leaves()
    with _Largest(case) as largest:
        _plain(case, mesh.groups.tp, 1.0).objective.backward()
    assert largest.numel == 128 * 96
    with _Largest(case) as largest:
        projected_loss(*case, mesh.groups.tp, chunk_rows=16).objective.backward()
    assert largest.numel == 16 * 96


def test_without_gradients_only_the_logits_of_a_chunk_exist(mesh: Mesh) -> None:
    case = _case(torch.float32, shape=(8, 2, 64, 96)).leaves()
    with torch.no_grad(), _Largest(case) as largest:
        loss = projected_loss(*case, mesh.groups.tp, chunk_rows=2)
    assert not loss.objective.requires_grad
    assert largest.numel == 2 * 96


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_rows", [4, 100])
def test_two_ranks_equal_one(dtype: torch.dtype, chunk_rows: int, mesh: Mesh, ranks: RankPool) -> None:
    case = _with_ties(_case(dtype))
    whole = case.leaves()
    expected = projected_loss(*whole, mesh.groups.tp, scale=0.3, chunk_rows=chunk_rows)
    assert expected.correct == _plain(case, mesh.groups.tp, 0.3).correct
    (expected.objective * 2.5).backward()
    assert whole.features_SBH.grad is not None and whole.weight_VH.grad is not None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    results = ranks.run(2, _share_of, case, chunk_rows)
    for values, _, _, likeliest_SB in results:
        torch.testing.assert_close(values, [value.item() for value in expected[:3]], rtol=tolerance, atol=tolerance)
        assert values[2] == expected.correct
        assert torch.equal(likeliest_SB, expected.likeliest_SB)
    dfeatures_SBH = results[0][1] + results[1][1]
    torch.testing.assert_close(dfeatures_SBH, whole.features_SBH.grad, rtol=tolerance, atol=tolerance)
    dweight_VH = torch.cat([result[2] for result in results])
    torch.testing.assert_close(dweight_VH, whole.weight_VH.grad, rtol=tolerance, atol=tolerance)


def _with_ties(case: Case) -> Case:
    """All rows are unmasked, and the second half of the vocabulary repeats the first. Every other label is the first
    of equals, the others are the second."""
    weight_VH = torch.cat([case.weight_VH[: V // 2]] * 2)
    best_SB = (case.features_SBH @ weight_VH.T).max(-1).indices
    second_SB = torch.arange(S * B).view(S, B) % 2 * (V // 2)
    return Case(case.features_SBH, weight_VH, best_SB + second_SB, torch.ones(S, B))


def _share_of(case: Case, chunk_rows: int) -> tuple[list[float], torch.Tensor, torch.Tensor, torch.Tensor]:
    """On each rank: the loss with its half of the vocabulary, both gradients, and the likeliest tokens."""
    group = dist.group.WORLD
    assert group is not None
    leaves = case._replace(weight_VH=case.weight_VH.chunk(2)[group.rank()]).leaves()
    loss = projected_loss(*leaves, group, scale=0.3, chunk_rows=chunk_rows)
    (loss.objective * 2.5).backward()
    assert leaves.features_SBH.grad is not None and leaves.weight_VH.grad is not None
    values = [value.item() for value in loss[:3]]
    return values, leaves.features_SBH.grad, leaves.weight_VH.grad, loss.likeliest_SB
