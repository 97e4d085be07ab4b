"""Biases and norms of heads: what they begin as, where they are, and half precision."""

import pytest
import torch
from helpers.models import whole_model

from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

ALL = {
    "qkv_bias": True,
    "qk_norm": True,
    "norm_epsilon": 0.5,
    "sliding_window": 4,
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
OWNERS = [*(f"layers.{layer}" for layer in range(1, 9)), "exits.2.block"]


def _stage(mesh: Mesh, dtype: torch.dtype = torch.float32, **model: object) -> Stage:
    return whole_model(mesh, exits=[2, 5], head=["block", "mlp"], dtype=dtype, model=model)


def test_what_begins_as_0_and_as_1(mesh: Mesh) -> None:
    """Of each attention, an exit's too, and of nothing else; all other parameters are what they are without."""
    plain = dict(_stage(mesh).named_parameters())
    own = dict(_stage(mesh, **ALL).named_parameters())
    width = (4 + 2 * 2) * 8
    expected = {f"{owner}.self_attention.linear_qkv.bias": torch.zeros(width) for owner in OWNERS}
    for name in ("q_layernorm", "k_layernorm"):
        expected |= {f"{owner}.self_attention.{name}.weight": torch.ones(8) for owner in OWNERS}
    assert own.keys() - plain.keys() == expected.keys()
    for name, value in {**plain, **expected}.items():
        assert torch.equal(own[name], value), name


def test_heads_are_normalised_with_the_models_epsilon(mesh: Mesh) -> None:
    attention = _stage(mesh, **ALL).layers["1"].self_attention
    x_SBND = torch.randn(3, 2, 4, 8)
    for norm in (attention.q_layernorm, attention.k_layernorm):
        torch.testing.assert_close(norm(x_SBND), x_SBND / (x_SBND.square().mean(-1, keepdim=True) + 0.5).sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(mesh: Mesh, dtype: torch.dtype) -> None:
    """With windows and documents, whose masks are of the same dtype."""
    exact, half = (_stage(mesh, dtype=kind, **ALL) for kind in (torch.float32, dtype))
    for ours, theirs in zip(half.parameters(), exact.parameters(), strict=True):
        ours.copy_(theirs)
    tokens_BS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    documents_BS = torch.arange(12).ge(5).long().expand(2, 12)
    for documents in (None, documents_BS):
        outputs = []
        for stage in (exact, half):
            x_SBH, _ = stage.run_layers(stage.embed(tokens_BS), torch.arange(12), 0, 8, documents_BS=documents)
            outputs.append(x_SBH)
        assert outputs[1].dtype == dtype
        error = (outputs[1].float() - outputs[0]).norm() / outputs[0].norm()
        assert 0 < error < 0.02
