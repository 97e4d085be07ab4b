"""How weights lie in memory changes no value, and no product."""

import pytest
import torch
from helpers.models import whole_model

from megatron_ee.inference import large_pages
from megatron_ee.inference.large_pages import Arena, room_for
from megatron_ee.inference.products import Product, Products, can_pack
from megatron_ee.inference.weight_layout import arrange_weights
from megatron_ee.parallel.mesh import Mesh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_arranged_weights_are_the_same_parameters(mesh: Mesh, dtype: torch.dtype) -> None:
    stage = whole_model(mesh, exits=[2, 5], dtype=dtype, head=["mlp", "block"])
    before = {name: (weight, weight.detach().clone()) for name, weight in stage.named_parameters()}
    tokens, positions = torch.arange(12)[None], torch.arange(12)
    with torch.no_grad():
        expected, _ = stage.run_layers(stage.embed(tokens), positions, 0, 8)
    arrange_weights(stage)
    after = dict(stage.named_parameters())
    assert after.keys() == before.keys()
    for name, (weight, values) in before.items():
        assert after[name] is weight
        assert torch.equal(weight, values), name
    wide = stage.projection_weight(8)
    assert wide.is_contiguous() == (dtype is torch.bfloat16), "64 outputs of 32 inputs"
    with torch.no_grad():
        actual, _ = stage.run_layers(stage.embed(tokens), positions, 0, 8)
    torch.testing.assert_close(actual, expected, atol=0.05 if dtype is torch.bfloat16 else 1e-5, rtol=0)


def test_tensors_of_an_arena_do_not_overlap_and_begin_as_zeros() -> None:
    shapes = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((2, 2, 2), torch.float64)]
    arena = Arena(sum(room_for(*of) for of in shapes))
    tensors = [arena.take(*of) for of in shapes]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1], [2], [3]]
    with pytest.raises(AssertionError, match="full"):
        arena.take((1,), torch.float32)
    assert large_pages.zeros((2, 3), torch.float16).shape == (2, 3)


def test_memory_that_moves_holds_what_it_held() -> None:
    numbers = torch.arange(3 << 20)
    large_pages.move(numbers.data_ptr() + 64, numbers.nbytes - 64)
    large_pages.move(0, 1)  # where nothing is, nothing moves
    assert torch.equal(numbers, torch.arange(3 << 20))


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("packs", [True, False])
def test_a_product_is_the_same_for_any_number_of_rows(rows: int, packs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 16, generator=generator), torch.randn(24, generator=generator)
    x, residual = torch.randn(rows, 16, generator=generator), torch.randn(rows, 24, generator=generator)
    expected = x.double() @ weight.double().t()
    product, without_bias = (Product(weight.t().contiguous().t(), of, packs=packs) for of in (bias, None))
    torch.testing.assert_close(product(x).double(), expected + bias, atol=1e-5, rtol=0)
    torch.testing.assert_close(without_bias.added_to(residual, x).double(), residual + expected, atol=1e-5, rtol=0)


def test_who_shares_a_matrix_shares_its_product() -> None:
    weight = torch.randn(8, 4)
    products = Products(packs=True)
    assert products.of(weight) is products.of(weight[:8])
    assert products.of(weight) is not products.of(weight[:7])
    assert not can_pack(weight.double())
