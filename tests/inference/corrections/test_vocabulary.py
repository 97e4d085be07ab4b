"""Exits whose logits cannot be held beside the final ones are refused by name."""

import pytest
import torch
from helpers.decoding import opened
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.errors import FieldError
from megatron_ee.inference.corrections import check_shared_vocabulary
from megatron_ee.inference.facts import facts_of
from megatron_ee.parallel.mesh import Mesh


def test_exits_of_another_size_are_named(mesh: Mesh) -> None:
    stage = whole_model(mesh, exits=[2, 4, 5], projection=["own", "shared", "own"])
    opened(stage)
    check_shared_vocabulary(facts_of(stage), "sled", [2, 4, 5])
    for layer, size in ((2, 40), (5, 80)):
        stage.head(layer).output.weight = torch.nn.Parameter(torch.zeros(size, 32), requires_grad=False)
    with pytest.raises(FieldError) as refused:
        check_shared_vocabulary(facts_of(stage), "dola", [2, 4, 5])
    assert refused.value.field == "inference.exit.mode"
    assert refused.value.message == (
        f"dola needs one vocabulary: the final output has {VOCAB_SIZE}, exit 2 has 40, exit 5 has 80"
    )
    check_shared_vocabulary(facts_of(stage), "sled", [4])
