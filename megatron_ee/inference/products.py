"""Products of a few rows with a model's matrices.

Shapes: N rows, I inputs, O outputs.
"""

from functools import cached_property

import torch

from megatron_ee.inference import large_pages

_PACKED_ROWS = 16
"""The number of rows that a packed matrix is made for; it serves any."""
_FEWEST_WEIGHTS = 1 << 18
"""A smaller matrix is multiplied sooner as it is: a call of oneDNN's costs more than its layout saves."""
_FEWEST_ROWS = 3
"""oneDNN reads a packed matrix for two rows at half the speed that it has for three to six: two are sent twice."""


class Product:
    """x W^T + b.

    Args:
        packs: of several rows, multiply by a copy of a large matrix that is laid out for them. It is made when it is
            first needed, and takes as much memory as the matrix.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, *, packs: bool) -> None:
        self._weight_OI, self._bias_O, self._transposed_IO = weight_OI, bias_O, weight_OI.t()
        self._packs = packs and weight_OI.numel() >= _FEWEST_WEIGHTS and can_pack(weight_OI)

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        if self._packs and x_NI.shape[0] > 1:
            return self._by_packed(x_NI)
        if self._bias_O is None:  # what torch's `linear` calls in the end
            return torch.mm(x_NI, self._transposed_IO)
        return torch.addmm(self._bias_O, x_NI, self._transposed_IO)

    def added_to(self, residual_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        """residual + x W^T; there is no bias."""
        if not self._packs or x_NI.shape[0] == 1:
            return torch.addmm(residual_NO, x_NI, self._transposed_IO)
        if x_NI.shape[0] < _FEWEST_ROWS:
            return residual_NO + self._by_packed(x_NI)
        return torch.ops.mkldnn._linear_pointwise.binary(x_NI, residual_NO, self._packed, None, "add")

    def _by_packed(self, x_NI: torch.Tensor) -> torch.Tensor:
        if x_NI.shape[0] < _FEWEST_ROWS:
            return self._by_packed(torch.cat((x_NI, x_NI)))[: x_NI.shape[0]]
        return torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, self._bias_O, "none", [], "")

    @cached_property
    def _packed(self) -> torch.Tensor:
        weight_OI = self._weight_OI.detach().contiguous()
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKED_ROWS)
        large_pages.move(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
        return packed


class Products:
    """A model's products: one for each matrix, whoever shares it."""

    def __init__(self, *, packs: bool) -> None:
        self._packs = packs
        self._made: dict[tuple[int, torch.Size], Product] = {}

    def of(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Product:
        key = weight_OI.data_ptr(), weight_OI.shape
        if key not in self._made:
            self._made[key] = Product(weight_OI, bias_O, packs=self._packs)
        return self._made[key]


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN, which packs matrices, is there and takes this one; half precisions gain nothing by it. (Its
    operators are those that torch's compiler uses, and no public ones, so they are looked for.)"""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "data_ptr")
    )
