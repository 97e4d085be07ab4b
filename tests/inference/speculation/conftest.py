"""Models in fp64 whose exits draft what full depth says now and then, or nearly always."""

import pytest
import torch
from helpers.decoding import opened
from helpers.drafts import counting_model, weaken
from helpers.models import whole_model

from megatron_ee.inference.opened import OpenedModel
from megatron_ee.parallel.mesh import Mesh


@pytest.fixture(scope="package")
def agreeing(mesh: Mesh) -> OpenedModel:
    """Its exit is always right; both count."""
    return counting_model(mesh)


@pytest.fixture(scope="package")
def random_model(mesh: Mesh) -> OpenedModel:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64)
    weaken(stage, after=2, factor=0.4)
    return opened(stage)
