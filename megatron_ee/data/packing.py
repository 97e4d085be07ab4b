"""Packing: whole conversations into sequences, anew in every epoch. A pure function of lengths, seed and epoch."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

_OPEN_SEQUENCES = 512  # more fill sequences a little better, and take longer; one of them closes when there are more


@dataclass(frozen=True, slots=True)
class Packing:
    """Which conversations are in which sequence.

    Attributes:
        order: int64, numbers of conversations, those of a sequence one after the other.
        starts: int64, where each sequence begins in `order`; and its end.
    """

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.order[self.starts[number] : self.starts[number + 1]]


def pack(lengths: np.ndarray, capacity: int, *, seed: int, epoch: int) -> Packing:
    """All conversations once, in random order, each in the fullest open sequence with room for it (best fit); then the
    sequences in random order.

    Args:
        lengths: of the conversations, each from 1 to `capacity`.
    """
    sequences: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of the open sequences, ascending: what is left, and the sequence's number
    for conversation in random_order(len(lengths), seed, epoch, 0).tolist():
        length = int(lengths[conversation])
        assert 0 < length <= capacity, "what doesn't fit has been left out"
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
            sequences[number].append(conversation)
        else:
            room, number = capacity, len(sequences)
            sequences.append([conversation])
        if room > length:
            insort(rooms, (room - length, number))
        if len(rooms) > _OPEN_SEQUENCES:
            del rooms[0]
    shuffled = [sequences[number] for number in random_order(len(sequences), seed, epoch, 1)]
    return _packing(shuffled)


def one_each(count: int, *, seed: int, epoch: int) -> Packing:
    """Every conversation in a sequence of its own, in random order."""
    return Packing(random_order(count, seed, epoch, 0), np.arange(count + 1))


def random_order(count: int, *key: int) -> np.ndarray:
    """A permutation that the key alone decides on. NumPy promises that raw numbers of a key stay the same in later
    versions, which it does not of its own permutations."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def _packing(sequences: list[list[int]]) -> Packing:
    starts = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=starts[1:])
    order = np.fromiter((number for sequence in sequences for number in sequence), dtype=np.int64, count=starts[-1])
    return Packing(order, starts)
