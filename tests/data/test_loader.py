"""Batches by sample number."""

from dataclasses import dataclass

import pytest
import torch
from helpers.tiny import RandomSamples

from megatron_ee.data.loader import BatchLoader
from megatron_ee.parallel.world import MeshError


@dataclass
class Place:
    """As much of a mesh as the loader looks at."""

    data_rank: int
    data_size: int

    @dataclass
    class Cpu:
        torch = torch.device("cpu")

    device = Cpu()


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 1), (2, 1), (4, 2), (1, 8)])
def test_a_batch_does_not_depend_on_the_ranks(data_size: int, micro_batch_size: int) -> None:
    expected = torch.stack([RandomSamples()[index]["tokens"] for index in range(16, 24)])
    shares = []
    for data_rank in range(data_size):
        place = Place(data_rank, data_size)
        loader = BatchLoader(
            RandomSamples(),
            place,  # type: ignore[arg-type]
            global_batch_size=8,
            micro_batch_size=micro_batch_size,
        )
        batch = loader.batch(16)
        assert batch.num_microbatches == loader.num_microbatches == 8 // (data_size * micro_batch_size)
        shares.append(batch.tokens_MBS)
    together = torch.stack(shares, dim=1).flatten(0, 2)
    torch.testing.assert_close(together, expected)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(MeshError, match=r"training.global_batch_size: 8 must be a multiple of .* = 3 x 1"):
        BatchLoader(RandomSamples(), Place(0, 1), global_batch_size=8, micro_batch_size=3)  # type: ignore[arg-type]
