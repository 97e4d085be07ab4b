"""Packing: every conversation once an epoch, whole, in an order that the seed alone decides on."""

import time
from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.data import packing
from megatron_ee.data.chat_samples import Epochs
from megatron_ee.data.packing import one_each, pack, random_order

CAPACITY = 16
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60).map(lambda lengths: np.array(lengths, dtype=np.int64))
KEYS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 50))


@given(LENGTHS, KEYS, st.integers(1, 6))
def test_every_conversation_is_whole_and_there_once(lengths: np.ndarray, key: tuple[int, int], num_open: int) -> None:
    seed, epoch = key
    with patch.object(packing, "_OPEN_SEQUENCES", num_open):
        packed = pack(lengths, CAPACITY, seed=seed, epoch=epoch)
    assert sorted(packed.order.tolist()) == list(range(len(lengths)))
    sequences = [packed[number] for number in range(len(packed))]
    assert all(0 < lengths[sequence].sum() <= CAPACITY for sequence in sequences)
    assert np.concatenate([*sequences, packed.order[:0]]).tolist() == packed.order.tolist()


@given(LENGTHS, KEYS)
def test_order_depends_on_seed_and_epoch_alone(lengths: np.ndarray, key: tuple[int, int]) -> None:
    seed, epoch = key
    first, again = (pack(lengths, CAPACITY, seed=seed, epoch=epoch) for _ in range(2))
    assert first.order.tolist() == again.order.tolist() and first.starts.tolist() == again.starts.tolist()
    single = one_each(len(lengths), seed=seed, epoch=epoch)
    assert sorted(single.order.tolist()) == list(range(len(lengths))) and set(np.diff(single.starts)) <= {1}


def test_epochs_and_seeds_differ() -> None:
    lengths = np.full(50, 5)
    orders = {tuple(pack(lengths, CAPACITY, seed=seed, epoch=epoch).order) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


def test_the_random_order_is_this_one_for_ever() -> None:
    """A run that is resumed with another NumPy has to go on in the same order."""
    assert random_order(8, 1, 2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_sequences_are_nearly_full_and_packing_takes_a_moment() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, size=20_000).astype(np.int64), 1, 2048)
    started = time.process_time()
    packed = pack(lengths, 2048, seed=0, epoch=0)
    assert time.process_time() - started < 5
    assert lengths.sum() / (len(packed) * 2048) > 0.97


@given(st.lists(st.integers(0, 200), max_size=30))
def test_a_sequence_of_any_epoch_is_the_same_whenever_it_is_asked_for(indices: list[int]) -> None:
    lengths = np.arange(1, 17)

    def pack_epoch(epoch: int) -> packing.Packing:
        return pack(lengths, CAPACITY, seed=3, epoch=epoch)

    expected: list[list[int]] = []
    for epoch in range(30):
        packed = pack_epoch(epoch)
        expected += [packed[number].tolist() for number in range(len(packed))]
    epochs = Epochs(pack_epoch)
    assert [epochs.sequence(index).tolist() for index in indices] == [expected[index] for index in indices]
