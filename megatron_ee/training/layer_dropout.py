"""Which samples skip which layers in a training step: the draws of layer dropout.

They depend on the seed, a sample's number in the training data, the layer and the iteration's probability alone. So
they are the same on tensor-parallel ranks and on all stages, whatever the split of a batch over data ranks, in
recomputation and after a resume, and there is no state to save.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

import torch

from megatron_ee.config import LayerDropoutConfig
from megatron_ee.model.layer_drop import KeptRows
from megatron_ee.training.curriculum import dropout_probabilities


class LayerDropout:
    """Draws for each sample by itself (Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, drop for
    the whole batch; LayerSkip, arXiv 2404.16710, does it for samples)."""

    def __init__(self, settings: LayerDropoutConfig, *, seed: int, num_layers: int, train_iters: int) -> None:
        self._settings, self._seed, self._num_layers, self._train_iters = settings, seed, num_layers, train_iters

    def probabilities(self, iteration: int) -> Mapping[int, float]:
        """With which probability a sample skips each layer (counted from 1), the first iteration being 0."""
        drawn = dropout_probabilities(
            self._settings, self._num_layers, iteration=iteration, train_iters=self._train_iters
        )
        return dict(enumerate(drawn, start=1))

    def figures(self, iteration: int) -> dict[str, float]:
        """The probabilities, under the names that they are logged by."""
        return {f"train/layer_{layer}/dropout": p for layer, p in self.probabilities(iteration).items()}

    def kept(
        self, samples_MB: Sequence[Sequence[int]], iteration: int, layers: Collection[int], device: torch.device
    ) -> list[KeptRows]:
        """The rows of each micro-batch that run each layer.

        Args:
            samples_MB: the samples' numbers in the training data.
            layers: those to answer for, counted from 1.
        """
        probabilities = self.probabilities(iteration)
        keys, rows = [], []
        for microbatch, samples in enumerate(samples_MB):
            draws = [self._draws(sample) for sample in samples]
            for layer in layers:
                kept = [row for row, draw in enumerate(draws) if draw[layer - 1] >= probabilities[layer]]
                if len(kept) < len(samples):
                    keys.append((microbatch, layer))
                    rows.append(kept)
        # one transfer for the whole step
        together = torch.tensor([row for kept in rows for row in kept], dtype=torch.int64).to(device)
        stops = list(accumulate(map(len, rows)))
        result: list[dict[int, torch.Tensor]] = [{} for _ in samples_MB]
        for (microbatch, layer), start, stop in zip(keys, [0, *stops], stops, strict=False):
            result[microbatch][layer] = together[start:stop]
        return list(result)

    def _draws(self, sample: int) -> list[float]:
        """A sample's number in [0, 1) for each layer: it skips those whose probability is above."""
        digest = hashlib.sha256(f"layer dropout/{self._seed}/{sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(self._num_layers, generator=generator, dtype=torch.float64).tolist()
