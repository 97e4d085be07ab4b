"""Final logits of a batch, each row corrected as its own request says.

Shapes: N rows, M some of them, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from megatron_ee.config import DolaParams, ExitParams, SledParams
from megatron_ee.inference.corrections.dola import dola
from megatron_ee.inference.corrections.sled import sled
from megatron_ee.inference.sampling.rows import pick

HeardRow: TypeAlias = tuple[ExitParams, Mapping[int, torch.Tensor]]
"""A request's settings, whose mode is sled or dola, and logits_V that its row has at exits, by layer. Those of exits
that the settings do not name are not looked at."""


def corrected(final_NV: torch.Tensor, rows: Sequence[HeardRow | None]) -> torch.Tensor:
    """[N, V] in the order of the rows, in fp64 where the final logits are, else in fp32; the very tensor where nothing
    is to be corrected. Rows of None keep their numbers.

    Args:
        rows: what is heard for each row; None: nothing.
    """
    assert len(rows) == len(final_NV)
    groups: dict[tuple[SledParams | DolaParams, tuple[int, ...]], list[int]] = {}
    for number, row in enumerate(rows):
        if row is not None:
            params, passed = row
            layers = params.heard(passed)
            assert layers, f"mode {params.mode} hears no exit"
            groups.setdefault((params.sled if params.mode == "sled" else params.dola, layers), []).append(number)
    if not groups:
        return final_NV
    changed_NV = final_NV.to(torch.promote_types(final_NV.dtype, torch.float32), copy=True)
    for (settings, layers), numbers in groups.items():
        early = [torch.stack([_passed(rows[number])[layer] for number in numbers]) for layer in layers]
        changed_NV[numbers] = _corrected(pick(final_NV, numbers), early, settings)
    return changed_NV


def _passed(row: HeardRow | None) -> Mapping[int, torch.Tensor]:
    assert row is not None
    return row[1]


def _corrected(
    final_MV: torch.Tensor, early: Sequence[torch.Tensor], settings: SledParams | DolaParams
) -> torch.Tensor:
    if isinstance(settings, SledParams):
        return sled(final_MV, early, settings)
    return dola(final_MV, early, settings)
