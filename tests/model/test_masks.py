"""Masks against the rule, position by position; how many are made; and that none is where none is needed."""

import pytest
import torch
from helpers.models import whole_model
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.model import masks, stage
from megatron_ee.model.attention import Launch
from megatron_ee.model.masks import decoding_masks, training_masks
from megatron_ee.parallel.mesh import Mesh

WINDOWS = st.sets(st.none() | st.integers(1, 9), min_size=1, max_size=2)
LIKE = torch.empty(0)


@given(WINDOWS, st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=2))
def test_within_documents(windows: set[int | None], documents: list[list[int]]) -> None:
    masked = training_masks(windows, 7, torch.tensor(documents), LIKE)
    assert masked.keys() == windows
    for window, mask_B1SS in masked.items():
        assert mask_B1SS is not None
        for row, of in enumerate(documents):
            for s in range(7):
                for t in range(7):
                    sees = s - (window or 7) < t <= s and of[s] == of[t]
                    assert mask_B1SS[row, 0, s, t] == (0 if sees else -torch.inf), (window, s, t)


@given(st.integers(1, 9), st.integers(1, 9))
def test_without_documents(window: int, length: int) -> None:
    masked = training_masks({window, None}, length, None, LIKE)
    assert masked[None] is None, "torch's causal kernels need none"
    if window >= length:
        assert masked[window] is None
        return
    mask = masked[window]
    assert mask is not None
    assert mask.shape == (1, 1, length, length)
    for s in range(length):
        assert (mask[0, 0, s] == 0).nonzero().flatten().tolist() == list(range(max(0, s - window + 1), s + 1))


@given(WINDOWS, st.sets(st.integers(0, 12), min_size=1))
def test_of_rows_at_any_positions(windows: set[int | None], positions: set[int]) -> None:
    rows = sorted(positions)
    for window, mask_ST in decoding_masks(windows, torch.tensor(rows)).items():
        for row, position in zip(mask_ST, rows, strict=True):
            first = 0 if window is None else max(0, position - window + 1)
            assert row.nonzero().flatten().tolist() == list(range(first, position + 1))


@pytest.mark.parametrize(
    ("model", "count"), [({}, 0), ({"sliding_window": 12}, 0), ({"sliding_window": 4}, 1)], ids=str
)
def test_a_launch_makes_what_its_layers_need(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, model: dict[str, int], count: int
) -> None:
    """Once for all layers; of documents one of each kind, and of a window that hides nothing none."""
    launches: list[Launch] = []
    making = masks._training_mask
    made: list[torch.Tensor] = []

    def counting(*arguments: object) -> torch.Tensor | None:
        mask = making(*arguments)  # type: ignore[arg-type]
        if mask is not None:
            made.append(mask)
        return mask

    monkeypatch.setattr(masks, "_training_mask", counting)
    model_stage = whole_model(mesh, exits=[2], model=model)
    run = stage.Stage._run_layer
    monkeypatch.setattr(stage.Stage, "_run_layer", lambda *a, **k: (launches.append(a[3]), run(*a, **k))[1])
    tokens_BS = torch.zeros(2, 12, dtype=torch.int64)
    model_stage.run_layers(model_stage.embed(tokens_BS), torch.arange(12), 0, 8)
    assert len(made) == count
    assert len(launches) == 8
    assert all(launch is launches[0] for launch in launches)
    model_stage.run_layers(model_stage.embed(tokens_BS), torch.arange(12), 0, 8, documents_BS=tokens_BS)
    assert len(made) == count + 1


def test_sequences_take_their_masks_along_where_others_skip_a_layer(mesh: Mesh) -> None:
    model = {"sliding_window": 4, "sliding_window_layers": [2, 3, 6]}
    model_stage = whole_model(mesh, exits=[2], model=model, dtype=torch.float64)
    tokens_BS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    documents_BS = torch.stack([torch.arange(12).ge(start).long() for start in (3, 6, 12)])
    x_SBH, positions = model_stage.embed(tokens_BS), torch.arange(12)
    rows_of = {1: [1, 2], 2: [2], 3: [0, 2], 6: [1], 7: []}

    def run(rows: list[int], documents_BS: torch.Tensor | None) -> torch.Tensor:
        kept = {layer: [rows.index(row) for row in of_layer if row in rows] for layer, of_layer in rows_of.items()}
        documents_KS = None if documents_BS is None else documents_BS[rows]
        rows_K = {layer: torch.tensor(numbers, dtype=torch.int64) for layer, numbers in kept.items()}
        y_SKH, _ = model_stage.run_layers(x_SBH[:, rows], positions, 0, 8, documents_BS=documents_KS, kept=rows_K)
        return y_SKH

    for documents in (documents_BS, None):
        alone_SBH = torch.cat([run([row], documents) for row in range(3)], dim=1)
        torch.testing.assert_close(run([0, 1, 2], documents), alone_SBH)
