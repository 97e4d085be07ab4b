"""Rows of a batch that ask for different corrections, or for none."""

import pytest
import torch

from megatron_ee.config import DolaParams, ExitParams, SledParams
from megatron_ee.inference.corrections import HeardRow, corrected, dola, sled

SLED, DOLA = ExitParams(mode="sled"), ExitParams(mode="dola")
VOCAB_SIZE = 24


def _draw(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCAB_SIZE, generator=generator, dtype=torch.float64)).to(dtype)


def _rows(settings: list[ExitParams | None], dtype: torch.dtype = torch.float64) -> list[HeardRow | None]:
    """What exits 2, 4 and 6 say."""
    said = {layer: _draw(len(settings), layer, dtype) for layer in (2, 4, 6)}
    return [
        None if params is None else (params, {layer: logits_NV[row] for layer, logits_NV in said.items()})
        for row, params in enumerate(settings)
    ]


def _heard(row: HeardRow, layers: tuple[int, ...] = (2, 4, 6)) -> list[torch.Tensor]:
    return [row[1][layer][None] for layer in layers]


def test_each_row_gets_what_it_asks_for() -> None:
    settings = [
        SLED,
        None,
        DOLA,
        ExitParams(mode="sled", sled=SledParams(alpha=0.5)),
        SLED,
        ExitParams(mode="sled", threshold=0.3),
        None,
        ExitParams(mode="dola", dola=DolaParams(relative_top=0.5)),
        DOLA,
    ]
    final_NV, rows = _draw(9, 0), _rows(settings)
    found_NV = corrected(final_NV, rows)
    for number, (params, row) in enumerate(zip(settings, rows, strict=True)):
        alone_NV = final_NV[[number]]
        if params is not None and params.mode == "sled":
            alone_NV = sled(alone_NV, _heard(row), params.sled)
        elif params is not None:
            alone_NV = dola(alone_NV, _heard(row), params.dola)
        torch.testing.assert_close(found_NV[number], alone_NV[0], rtol=1e-14, atol=1e-14)


def test_equal_settings_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else their requests ask for, which has no part in it."""
    sizes: list[int] = []

    def counting(final_MV: torch.Tensor, early: list[torch.Tensor], params: SledParams) -> torch.Tensor:
        sizes.append(len(final_MV))
        return sled(final_MV, early, params)

    monkeypatch.setitem(corrected.__globals__, "sled", counting)
    others = ExitParams(mode="sled", threshold=0.2, thresholds={2: 0.4}, max_pending=3)
    corrected(_draw(5, 0), _rows([SLED, others, None, ExitParams(mode="sled", sled=SledParams(steps=2)), SLED]))
    assert sorted(sizes) == [1, 3]


def test_only_named_exits_are_heard() -> None:
    """In ascending order: of equals DoLa takes the shallowest, whatever order they come in."""
    few = ExitParams(mode="sled", sled=SledParams(layers=(6, 2)))
    final_NV, (row,) = _draw(1, 0), _rows([few])
    assert torch.equal(corrected(final_NV, [row]), sled(final_NV, _heard(row, (2, 6)), few.sled))
    same_V = row[1][2]
    mirrored = {4: same_V.flip(0), 2: same_V}
    flat_NV = torch.zeros_like(final_NV)
    assert torch.equal(corrected(flat_NV, [(DOLA, mirrored)]), dola(flat_NV, [same_V[None]], DOLA.dola))


def test_rows_that_hear_different_exits_are_apart() -> None:
    final_NV, rows = _draw(3, 0), _rows([SLED, SLED, SLED])
    rows[1] = SLED, {4: rows[1][1][4]}
    found_NV = corrected(final_NV, rows)
    torch.testing.assert_close(found_NV[[1]], sled(final_NV[[1]], _heard(rows[1], (4,)), SLED.sled))
    torch.testing.assert_close(found_NV[[2]], sled(final_NV[[2]], _heard(rows[2]), SLED.sled))


def test_where_nothing_is_to_be_corrected_nothing_is_copied() -> None:
    final_NV = _draw(3, 0, torch.bfloat16)
    assert corrected(final_NV, [None] * 3) is final_NV


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_none_keep_their_numbers(dtype: torch.dtype) -> None:
    final_NV = _draw(3, 0, dtype)
    given_NV = final_NV.clone()
    rows = _rows([None, SLED, None], dtype)
    found_NV = corrected(final_NV, rows)
    assert torch.equal(final_NV, given_NV)
    assert found_NV.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found_NV[[0, 2]], final_NV[[0, 2]].to(found_NV.dtype))
    assert not torch.equal(found_NV[1], final_NV[1].to(found_NV.dtype))


def test_a_row_of_nan_touches_no_other() -> None:
    final_NV, rows = _draw(4, 0), _rows([SLED, SLED, DOLA, DOLA])
    expected_NV = corrected(final_NV, rows)
    final_NV[[1, 3]] = torch.nan
    found_NV = corrected(final_NV, rows)
    assert found_NV[[1, 3]].isnan().all()
    assert torch.equal(found_NV[[0, 2]], expected_NV[[0, 2]])
