"""Token weights and distillation, by chunks and plain, against closed forms, an independent loss and differences of it;
and over two ranks."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

from megatron_ee.model.chunked_loss import ProjectedLoss, projected_loss
from megatron_ee.model.token_objective import CROSS_ENTROPY, Teacher, TokenObjective, plain_losses
from megatron_ee.parallel.mesh import Mesh

S, B, H, V = 5, 3, 8, 24
SCALE = 0.3
OBJECTIVES = {
    "token weights": TokenObjective(weighs_tokens=True),
    "distillation": TokenObjective(distillation=0.5),
    "distillation alone": TokenObjective(distillation=1.0),
    "warm distillation": TokenObjective(distillation=0.7, temperature=2.5),
    "cool distillation": TokenObjective(distillation=0.3, temperature=0.5),
    "all": TokenObjective(weighs_tokens=True, distillation=0.6, temperature=3.0),
}


class Case(NamedTuple):
    features_SBH: torch.Tensor
    weight_VH: torch.Tensor
    labels_SB: torch.Tensor
    mask_SB: torch.Tensor
    teacher: Teacher

    def leaves(self) -> "Case":
        return self._replace(
            features_SBH=self.features_SBH.detach().clone().requires_grad_(),
            weight_VH=self.weight_VH.detach().clone().requires_grad_(),
        )


def _case(dtype: torch.dtype = torch.float64, seed: int = 0, size: tuple[int, int, int, int] = (S, B, H, V)) -> Case:
    positions, sequences, hidden, vocabulary = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    features_SBH, weight_VH = draw(positions, sequences, hidden), draw(vocabulary, hidden)
    labels_SB = torch.randint(vocabulary, (positions, sequences), generator=generator)
    mask_SB = (torch.rand(positions, sequences, generator=generator) < 0.7).float()
    teacher = Teacher(draw(positions, sequences, hidden), draw(vocabulary, hidden))
    return Case(features_SBH, weight_VH, labels_SB, mask_SB, teacher)


def _independent(case: Case, objective: TokenObjective, *, weights_SB: torch.Tensor | None = None) -> torch.Tensor:
    """The whole loss, by torch's own functions; `weights_SB` holds the token weights constant."""
    logits_SBV = case.features_SBH @ case.weight_VH.T
    wanted_SBV = case.teacher.features_SBH @ case.teacher.weight_VH.T
    losses_SB = cross_entropy(logits_SBV.flatten(0, 1), case.labels_SB.flatten(), reduction="none").view(S, B)
    share, temperature = objective.distillation, objective.temperature
    log_SBV, log_wanted_SBV = ((of / temperature).log_softmax(-1) for of in (logits_SBV, wanted_SBV))
    divergences_SB = kl_div(log_SBV, log_wanted_SBV, reduction="none", log_target=True).sum(-1)
    losses_SB = (1 - share) * losses_SB + share * temperature**2 * divergences_SB
    if objective.weighs_tokens:
        losses_SB = losses_SB * (_token_weights(case) if weights_SB is None else weights_SB)
    return SCALE * (losses_SB * case.mask_SB).sum()


def _token_weights(case: Case) -> torch.Tensor:
    return (case.features_SBH @ case.weight_VH.T).softmax(-1).amax(-1).detach()


def _chunked(case: Case, objective: TokenObjective, group: dist.ProcessGroup, chunk_rows: int = 4) -> ProjectedLoss:
    return projected_loss(*case[:4], group, scale=SCALE, chunk_rows=chunk_rows, objective=objective, teacher=case[4])


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
    ids=str,
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_equal_torchs_own_functions(
    name: str, dtype: torch.dtype, tolerance: float, chunk_rows: int, mesh: Mesh
) -> None:
    case, objective = _case(dtype), OBJECTIVES[name]
    exact = case._replace(
        features_SBH=case.features_SBH.double(),
        weight_VH=case.weight_VH.double(),
        teacher=Teacher(*(value.double() for value in case.teacher)),
    ).leaves()
    expected, leaves = _independent(exact, objective), case.leaves()
    loss = _chunked(leaves, objective, mesh.groups.tp, chunk_rows)
    plain = _chunked(case, CROSS_ENTROPY, mesh.groups.tp, chunk_rows)
    torch.testing.assert_close(loss.objective.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert torch.equal(loss.cross_entropy, plain.cross_entropy), "what is measured stays cross-entropy"
    torch.autograd.backward(loss.objective)
    torch.autograd.backward(expected)
    for mine, wanted in zip(leaves[:2], exact[:2], strict=True):
        assert mine.grad is not None and wanted.grad is not None
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_differences_of_the_loss(name: str, mesh: Mesh) -> None:
    """In fp64, with the token weights and the teacher held where they were."""
    case, objective = _case(), OBJECTIVES[name]
    weights_SB, leaves, step = _token_weights(case), case.leaves(), 1e-6
    torch.autograd.backward(_chunked(leaves, objective, mesh.groups.tp).objective)
    for which in (0, 1):
        gradient, value = leaves[which].grad, case[which]
        assert gradient is not None
        for place in list(product(*map(range, value.shape)))[::7]:
            moved = []
            for sign in (1, -1):
                changed = value.clone()
                changed[place] += sign * step
                there = case._replace(**{Case._fields[which]: changed})
                moved.append(float(_independent(there, objective, weights_SB=weights_SB)))
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float(gradient[place]), abs=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_plain_version_is_the_same(name: str, mesh: Mesh) -> None:
    case, objective = _case(torch.float32), OBJECTIVES[name]
    plain, chunked = case.leaves(), case.leaves()
    logits_SBV = plain.features_SBH @ plain.weight_VH.T
    losses_SB = plain_losses(logits_SBV, case.labels_SB, objective, case.teacher, mesh.groups.tp)
    expected = SCALE * (losses_SB * case.mask_SB).sum()
    loss = _chunked(chunked, objective, mesh.groups.tp)
    torch.testing.assert_close(loss.objective, expected)
    for objective_value in (loss.objective, expected):
        torch.autograd.backward(objective_value)
    for mine, wanted in zip(chunked[:2], plain[:2], strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.01, 1), temperature=st.floats(0.2, 8), weighs=st.booleans(), seed=st.integers(0, 1000))
def test_any_settings(share: float, temperature: float, weighs: bool, seed: int, mesh: Mesh) -> None:
    case, objective = _case(seed=seed), TokenObjective(weighs, share, temperature)
    leaves, exact = case.leaves(), case.leaves()
    loss, expected = _chunked(leaves, objective, mesh.groups.tp), _independent(exact, objective)
    torch.testing.assert_close(loss.objective.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    for value in (loss.objective, expected):
        torch.autograd.backward(value)
    torch.testing.assert_close(leaves.features_SBH.grad, exact.features_SBH.grad, rtol=1e-9, atol=1e-9)


def _two_tokens(logit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One row whose logits are (logit, 0)."""
    return torch.tensor([[[logit]]], dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)


def test_closed_forms_of_two_tokens(mesh: Mesh) -> None:
    """p = sigmoid(x) of token 0, the label; q = sigmoid(y) of the teacher."""
    x, y, share, temperature = 0.8, -0.4, 0.25, 2.0
    features, weight = _two_tokens(x)
    case = Case(features, weight, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), Teacher(*_two_tokens(y)))
    p, p_t, q_t = (1 / (1 + 2.718281828459045**-value) for value in (x, x / temperature, y / temperature))
    log = torch.log
    tensor = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    divergence = q_t * log(tensor(q_t / p_t)) + (1 - q_t) * log(tensor((1 - q_t) / (1 - p_t)))
    expected = (1 - share) * -log(tensor(p)) + share * temperature**2 * divergence
    gradient = (1 - share) * (p - 1) + share * temperature * (p_t - q_t)
    for weighs, factor in ((False, 1.0), (True, p)):
        leaves = case.leaves()
        loss = _chunked(leaves, TokenObjective(weighs, share, temperature), mesh.groups.tp)
        torch.testing.assert_close(loss.objective.detach(), SCALE * factor * expected)
        torch.autograd.backward(loss.objective)
        assert leaves.features_SBH.grad is not None
        assert leaves.features_SBH.grad.item() == pytest.approx(SCALE * factor * gradient)


def test_an_exit_that_agrees_with_its_teacher_learns_nothing(mesh: Mesh) -> None:
    case = _case()
    case = case._replace(teacher=Teacher(case.features_SBH, case.weight_VH))
    leaves = case.leaves()
    loss = _chunked(leaves, TokenObjective(distillation=1.0, temperature=2.0), mesh.groups.tp)
    torch.autograd.backward(loss.objective)
    assert abs(float(loss.objective.detach())) < 1e-12
    assert leaves.weight_VH.grad is not None and float(leaves.weight_VH.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_rows_count_for_nothing(name: str, mesh: Mesh) -> None:
    case, objective = _case(), OBJECTIVES[name]
    masked_SB = case.mask_SB == 0
    dirty = case._replace(
        features_SBH=torch.where(masked_SB[..., None], case.features_SBH * 50, case.features_SBH),
        labels_SB=torch.where(masked_SB, -100, case.labels_SB),
        teacher=case.teacher._replace(
            features_SBH=torch.where(masked_SB[..., None], -case.teacher.features_SBH, case.teacher.features_SBH)
        ),
    )
    gradients = []
    for inputs in (case.leaves(), dirty.leaves()):
        torch.autograd.backward(_chunked(inputs, objective, mesh.groups.tp).objective)
        gradients.append(inputs.weight_VH.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_equal_one(name: str, dtype: torch.dtype, mesh: Mesh, ranks: RankPool) -> None:
    case, objective = _case(dtype), OBJECTIVES[name]
    whole, tolerance = case.leaves(), 1e-12 if dtype == torch.float64 else 1e-5
    expected = _chunked(whole, objective, mesh.groups.tp)
    torch.autograd.backward(expected.objective)
    results = ranks.run(2, _share_of, case, objective)
    assert whole.features_SBH.grad is not None and whole.weight_VH.grad is not None
    for value, _, _ in results:
        assert value == pytest.approx(expected.objective.item(), rel=tolerance)
    torch.testing.assert_close(results[0][1] + results[1][1], whole.features_SBH.grad, rtol=tolerance, atol=tolerance)
    dweight_VH = torch.cat([result[2] for result in results])
    torch.testing.assert_close(dweight_VH, whole.weight_VH.grad, rtol=tolerance, atol=tolerance)


def _share_of(case: Case, objective: TokenObjective) -> tuple[float, torch.Tensor, torch.Tensor]:
    """On each rank, with its half of the vocabulary."""
    group = dist.group.WORLD
    assert group is not None
    teacher = case.teacher._replace(weight_VH=case.teacher.weight_VH.chunk(2)[group.rank()])
    leaves = case._replace(weight_VH=case.weight_VH.chunk(2)[group.rank()], teacher=teacher).leaves()
    loss = _chunked(leaves, objective, group)
    torch.autograd.backward(loss.objective)
    assert leaves.features_SBH.grad is not None and leaves.weight_VH.grad is not None
    return loss.objective.item(), leaves.features_SBH.grad, leaves.weight_VH.grad
