"""Every test here runs in child processes, on the CPU to prove the test itself and on GPUs where there are enough."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import pytest
import torch
from helpers.ranks import RankPool

# pytest's own process has chosen the CPU (tests/conftest.py), so that it asks for no more of CUDA than this number.
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


class Place(NamedTuple):
    """Where a test's cases run."""

    device: Literal["cpu", "cuda"]
    pool: RankPool

    def run(self, world_size: int, case: Callable[..., Any], *args: Any) -> list[Any]:
        """What `case(device, *args)` returns on each rank; skips the test where GPUs are missing."""
        if self.device == "cuda" and world_size > NUM_GPUS:
            pytest.skip(f"needs {world_size} GPU{'s' * (world_size > 1)}, and this machine has {NUM_GPUS}")
        return self.pool.run(world_size, case, self.device, *args)


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[RankPool]:
    pool = RankPool("cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpu(gpu_ranks: RankPool) -> Place:
    """For what has no meaning without CUDA."""
    return Place("cuda", gpu_ranks)


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest, ranks: RankPool, gpu: Place) -> Place:
    """A test that takes this runs twice: on the CPU over gloo, and on GPUs over NCCL."""
    return gpu if request.param == "cuda" else Place("cpu", ranks)


@pytest.fixture(scope="session")
def cpu_place(ranks: RankPool) -> Place:
    """The other side of comparisons."""
    return Place("cpu", ranks)
