"""A model in fp64 whose exits are right now and then; in one of two cases their heads attend."""

import pytest
import torch
from helpers.decoding import opened
from helpers.drafts import weaken
from helpers.models import whole_model

from megatron_ee.inference.opened import OpenedModel
from megatron_ee.parallel.mesh import Mesh


@pytest.fixture(scope="package", params=["norm", "block"])
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, head=request.param)
    weaken(stage, after=2, factor=0.5)
    return opened(stage)
