"""From a dataset to batches, by sample number: resumable at any sample, and the same for any number of ranks."""

from collections.abc import Mapping
from typing import Protocol

import torch

from megatron_ee.data.batch import Batch
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.world import count_microbatches


class SampleSource(Protocol):
    """A map-style dataset: sample number -> tensors `tokens`, `labels`, `loss_mask` of one sequence.

    Where sequences hold several documents that don't see each other, also `positions` and `documents`; see `Batch`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]: ...


class BatchLoader:
    """Cuts this rank's share out of every global batch.

    Micro-batch m of data-parallel rank r holds samples `first + (m * data_size + r) * micro_batch_size` and on, so
    what a global batch contains depends on `first` alone. Fills, extra micro-batches for a pipeline's idle time, come
    after it and are cut in the same way.
    """

    def __init__(
        self, source: SampleSource, mesh: Mesh, *, global_batch_size: int, micro_batch_size: int, num_fills: int = 0
    ) -> None:
        """
        Raises:
            MeshError: the global batch doesn't divide over data-parallel ranks and micro-batches.
        """
        self.num_microbatches = count_microbatches(global_batch_size, micro_batch_size, mesh.data_size)
        self.num_fills = num_fills
        self._source, self._mesh = source, mesh
        self._micro_batch_size = micro_batch_size

    @property
    def samples_per_batch(self) -> int:
        """Samples that a step draws from the source, over all ranks, fills included."""
        return (self.num_microbatches + self.num_fills) * self._micro_batch_size * self._mesh.data_size

    def sample_numbers(self, first_sample: int) -> list[range]:
        """The samples of each of this rank's micro-batches, fills included, in the global batch that begins there."""
        size, data_size, data_rank = self._micro_batch_size, self._mesh.data_size, self._mesh.data_rank
        count = self.num_microbatches + self.num_fills
        starts = (first_sample + (m * data_size + data_rank) * size for m in range(count))
        return [range(start, start + size) for start in starts]

    def batch(self, first_sample: int) -> Batch:
        """This rank's share of the global batch that begins at a sample number, and of the fills after it."""
        size, count = self._micro_batch_size, self.num_microbatches + self.num_fills
        samples = [self._source[number] for numbers in self.sample_numbers(first_sample) for number in numbers]

        def stack(name: str) -> torch.Tensor:
            rows = torch.stack([sample[name] for sample in samples])
            return rows.view(count, size, -1).to(self._mesh.device.torch)

        packed = {f"{name}_MBS": stack(name) for name in ("positions", "documents") if name in samples[0]}
        return Batch(stack("tokens"), stack("labels"), stack("loss_mask"), **packed)
