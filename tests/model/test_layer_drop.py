"""Rows that skip a layer are not computed, and come out of it as they went in; exits hold no copies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_config

from megatron_ee.model.initialize import initialize
from megatron_ee.model.layer_drop import KeptRows
from megatron_ee.model.stage import Stage, Tap
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.mesh import Mesh

POSITIONS = torch.arange(SEQUENCE_LENGTH)


def _stage(mesh: Mesh, **exits: object) -> Stage:
    config = tiny_config(exits=exits)
    (chunks,) = place(config.model, config.exits, config.parallel)
    stage = Stage(config.model, config.exits, chunks, vocab_size=VOCAB_SIZE, groups=mesh.groups, device=mesh.device)
    initialize(stage, 0)
    return stage


def _x(rows: int = 5) -> torch.Tensor:
    return torch.randn(SEQUENCE_LENGTH, rows, 32, generator=torch.Generator().manual_seed(0))


@contextmanager
def _rows_seen(stage: Stage) -> Iterator[dict[int, list[int]]]:
    """By layer: how many rows it saw in each of its runs."""
    seen: dict[int, list[int]] = {int(layer): [] for layer in stage.layers}

    def count(layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
        return lambda _, inputs: seen[layer].append(inputs[0].shape[1])

    handles = [module.register_forward_pre_hook(count(int(layer))) for layer, module in stage.layers.items()]
    yield seen
    for handle in handles:
        handle.remove()


def test_layers_see_the_rows_that_run_them_and_no_others(mesh: Mesh) -> None:
    stage = _stage(mesh, layers=[])
    kept: KeptRows = {2: torch.tensor([0, 3]), 5: torch.tensor([], dtype=torch.int64), 8: torch.tensor([4])}
    with _rows_seen(stage) as seen:
        stage.run_layers(_x(), POSITIONS, 0, 8, kept=kept)
    assert seen == {1: [5], 2: [2], 3: [5], 4: [5], 5: [], 6: [5], 7: [5], 8: [1]}


@pytest.mark.parametrize("head", ["norm", "mlp"])
def test_a_row_is_what_it_is_alone_without_the_layers_that_it_skips(mesh: Mesh, head: str) -> None:
    """Also at an MLP head, which reads the state after attention: of a row that skips the layer, the layer's input."""
    stage, x = _stage(mesh, layers=[2, 5], head=head), _x()
    kept: KeptRows = {2: torch.tensor([0, 3]), 5: torch.tensor([], dtype=torch.int64), 8: torch.tensor([1, 2, 4])}
    y, taps = stage.run_layers(x, POSITIONS, 0, 8, kept=kept)
    for row in range(5):
        h, states = x[:, row : row + 1], {}
        for layer in range(1, 9):
            before = h
            if layer not in kept or row in kept[layer]:
                h, passed = stage.run_layers(h, POSITIONS, layer - 1, layer)
                states.update(passed)
            elif str(layer) in stage.exits:
                states[stage.tap_of(layer)] = before
        torch.testing.assert_close(y[:, row : row + 1], h)
        assert taps.keys() == states.keys() == {Tap(2, "attention" if head == "mlp" else "output"), *list(taps)[1:]}
        for tap, state in states.items():
            torch.testing.assert_close(taps[tap][:, row : row + 1], state)


def test_sequences_at_different_positions_keep_theirs(mesh: Mesh) -> None:
    stage, x = _stage(mesh, layers=[]), _x(3)
    positions = torch.stack([POSITIONS, POSITIONS + 7, POSITIONS * 3], dim=1)
    y, _ = stage.run_layers(x, positions, 0, 1, kept={1: torch.tensor([0, 2])})
    alone, _ = stage.run_layers(x[:, 2:], positions[:, 2:], 0, 1)
    torch.testing.assert_close(y[:, 2:], alone)
    torch.testing.assert_close(y[:, 1], x[:, 1])


def _kept_bytes(stage: Stage, *, dropped: bool = False) -> int:
    """Of storages that a forward leaves for the backward and for the exits, each once; parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        return tensor

    kept = {layer: torch.tensor([0, 2]) for layer in range(1, 9)} if dropped else None
    x = _x().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, taps = stage.run_layers(x, POSITIONS, 0, 8, kept=kept)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*alive, x, y, *taps.values())
    }
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_an_exit_on_every_layer_keeps_nothing_that_the_layers_do_not(mesh: Mesh) -> None:
    """A layer's output is kept by the next one's norm anyway; the last exit's gradient is X's (see the design)."""
    every = _kept_bytes(_stage(mesh, layers="all", norm="shared"))
    none = _kept_bytes(_stage(mesh, layers=[]))
    assert every == none > 0


def test_layers_that_rows_skip_keep_less(mesh: Mesh) -> None:
    stage = _stage(mesh, layers="all", norm="shared")
    state = _x().nbytes
    everything, dropped = _kept_bytes(stage), _kept_bytes(stage, dropped=True)
    # beside the rows that run: the states between layers, of all rows; and of each layer, its output's rows once more
    assert dropped <= 2 / 5 * everything + 9 * state + 8 * 2 / 5 * state
    assert dropped < 0.6 * everything
