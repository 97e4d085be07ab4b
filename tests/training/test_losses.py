"""The loss of an exit, all logits at once and a few rows at a time."""

import pytest
import torch
from helpers.models import whole_model
from helpers.tiny import SEQUENCE_LENGTH

from megatron_ee.model.chunked_loss import ProjectedLoss
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.losses import exit_loss

LAYER = 2


@pytest.fixture(scope="module")
def stage(mesh: Mesh) -> Stage:
    return whole_model(mesh, exits=[LAYER])


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(SEQUENCE_LENGTH, 2, 32, generator=torch.Generator().manual_seed(0))


def _loss(
    stage: Stage, features_SBH: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor, chunk_rows: int
) -> ProjectedLoss:
    return exit_loss(stage, features_SBH, LAYER, labels_BS, mask_BS, scale=0.25, chunk_rows=chunk_rows)


@pytest.mark.parametrize("chunk_rows", [0, 1, 7, 1000])
def test_a_loss_counts_unmasked_tokens_alone(stage: Stage, features: torch.Tensor, chunk_rows: int) -> None:
    logits_BSV = stage.project(features, LAYER).transpose(0, 1)
    labels_BS = logits_BSV.argmax(-1)
    mask_BS = torch.zeros(2, SEQUENCE_LENGTH)
    mask_BS[0, 0] = mask_BS[0, 2] = mask_BS[1, -1] = 1
    loss = _loss(stage, features, labels_BS, mask_BS, chunk_rows)
    expected = -logits_BSV.log_softmax(-1).amax(-1)[mask_BS.bool()].sum()
    torch.testing.assert_close(loss.cross_entropy, expected)
    torch.testing.assert_close(loss.objective, 0.25 * expected)
    assert float(loss.correct) == 3
    labels_BS[0, 1] = (labels_BS[0, 1] + 1) % 64
    again = _loss(stage, features, labels_BS, mask_BS, chunk_rows)
    torch.testing.assert_close(again, loss, msg="a masked label doesn't matter")


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_rows_at_a_time_give_the_gradients_of_all_at_once(mesh: Mesh, features: torch.Tensor, chunk_rows: int) -> None:
    labels_BS = torch.randint(64, (2, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(1))
    mask_BS = (torch.rand(2, SEQUENCE_LENGTH, generator=torch.Generator().manual_seed(2)) > 0.3).float()
    gradients = []
    for rows in (0, chunk_rows):
        stage = whole_model(mesh, exits=[LAYER]).requires_grad_(True)
        leaf_SBH = features.clone().requires_grad_()
        torch.autograd.backward(_loss(stage, leaf_SBH, labels_BS, mask_BS, rows).objective)
        assert stage.output is not None
        gradients.append((leaf_SBH.grad, stage.output.weight.grad))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=0)
