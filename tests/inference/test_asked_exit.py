"""What an exit may be asked for, beside what `Stage` says of it."""

import pytest
import torch
from helpers.decoding import opened
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.depth_walk import DepthWalk
from megatron_ee.parallel.mesh import Mesh


@torch.no_grad()
@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_output_logits_are_the_layers_output_projected_as_it_is(mesh: Mesh, head: str, temperature: float) -> None:
    stage = whole_model(
        mesh, exits=[3, 5], dtype=torch.float64, head=head, projection=["own", "shared"], temperature=temperature
    )
    model = opened(stage)
    tokens = torch.randint(VOCAB_SIZE, (7,), generator=torch.Generator().manual_seed(0)).tolist()
    for layer in (3, 5):
        walk = DepthWalk(model.runner, model.exits, slots=1, capacity=8, room=8)
        walk.ledger.open(0, blocks=[layer] if head == "block" else [])
        asked = walk.enter({0: tokens}, layer).ask([0])
        positions = torch.arange(7)
        output_SBH, _ = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, layer)
        expected_V = output_SBH[-1, 0] @ stage.projection_weight(layer).T / temperature
        torch.testing.assert_close(asked.output_logits, expected_V[None], rtol=0, atol=1e-10)
        assert (asked.output_logits - asked.logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["logits", "output_logits"])
def test_what_is_computed_is_not_computed_again(mesh: Mesh, name: str) -> None:
    model = opened(whole_model(mesh, exits=[3]))
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    asked = AskedExit(model.runner, 3, hidden_NH=states, output_NH=2 * states + 1, previous_NH=states)
    unasked_NV = getattr(asked.of([2, 0]), name)
    all_NV = getattr(asked, name)
    projections = model.runner.work.projections[3]
    assert torch.equal(getattr(asked.of([2, 0]), name), all_NV[[2, 0]])
    assert getattr(asked.of(range(4)), name) is all_NV
    assert model.runner.work.projections[3] == projections == 2
    torch.testing.assert_close(unasked_NV, all_NV[[2, 0]])
