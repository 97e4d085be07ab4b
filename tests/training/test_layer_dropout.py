"""Who skips what: the same however a batch is cut, at the rates that are asked for, and independent of each other."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import LayerDropoutConfig
from megatron_ee.training.layer_dropout import LayerDropout

CPU = torch.device("cpu")
NUM_LAYERS = 6


def _dropout(seed: int = 0, **settings: object) -> LayerDropout:
    config = LayerDropoutConfig.model_validate({"maximum": 0.5, "shape": "uniform", **settings})
    return LayerDropout(config, seed=seed, num_layers=NUM_LAYERS, train_iters=100)


def _table(dropout: LayerDropout, first: int, count: int, iteration: int = 0) -> np.ndarray:
    """[samples, layers]: True where a sample runs a layer, asked for all samples in one micro-batch."""
    (kept,) = dropout.kept([range(first, first + count)], iteration, range(1, NUM_LAYERS + 1), CPU)
    table = np.ones((count, NUM_LAYERS), dtype=bool)
    for layer, rows in kept.items():
        table[:, layer - 1] = False
        table[rows.numpy(), layer - 1] = True
    return table


@given(st.integers(0, 2**40), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sets(st.integers(1, NUM_LAYERS)))
def test_it_does_not_matter_who_asks(first: int, sizes: list[int], layers: set[int]) -> None:
    """Any cut into micro-batches, any stage's layers."""
    dropout = _dropout()
    table = _table(dropout, first, sum(sizes))
    stops = np.cumsum(sizes)
    samples = [range(first + stop - size, first + stop) for size, stop in zip(sizes, stops, strict=True)]
    for kept, stop, size in zip(dropout.kept(samples, 0, sorted(layers), CPU), stops, sizes, strict=True):
        for layer in layers:
            expected = np.flatnonzero(table[stop - size : stop, layer - 1])
            rows = kept[layer].tolist() if layer in kept else list(range(size))
            assert rows == expected.tolist()
            assert (layer in kept) == (len(expected) < size), "absent where all run"


def test_rates() -> None:
    """4,000 samples: within 5 standard deviations of p at every layer."""
    table = _table(_dropout(maximum=0.3, shape="linear"), 0, 4000)
    for layer in range(NUM_LAYERS):
        p = 0.3 * layer / (NUM_LAYERS - 1)
        assert abs((~table[:, layer]).mean() - p) <= 5 * np.sqrt(p * (1 - p) / 4000)


def test_layers_and_neighbouring_samples_are_independent() -> None:
    skips = ~_table(_dropout(), 0, 4000)
    for other in (np.roll(skips, 1, axis=0), np.roll(skips, 1, axis=1)):
        assert abs((skips & other).mean() - 0.25) < 0.02


def test_another_seed_is_another_draw() -> None:
    assert (_table(_dropout(), 0, 50) != _table(_dropout(seed=1), 0, 50)).any()


def test_a_higher_probability_skips_what_a_lower_one_did_and_more() -> None:
    """Of the same samples, as the iteration's probability grows."""
    dropout = _dropout(maximum=0.8, curriculum="exponential")
    early, late = _table(dropout, 0, 200, iteration=20), _table(dropout, 0, 200, iteration=90)
    assert (late <= early).all() and late.sum() < early.sum() < early.size
    assert _table(dropout, 0, 200, iteration=0).all()
