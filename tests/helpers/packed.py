"""Sequences of several short documents, and what they are worth one by one: the oracle of packing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from helpers import reference
from helpers.one_step import Arrays
from helpers.shards import whole
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE
from megatron_ee.config import Config
from megatron_ee.training.loss_weights import loss_weights

SIZES = ((12,), (5, 4, 3), (1, 11), (2, 2, 2, 2), (7,), (3, 8), (6, 6), (10, 1))  # what is left is padding
WITHOUT_LOSS = 4  # of these samples: nothing of it counts


class PackedSamples:
    """Documents of random tokens; sample i is the same everywhere, and its masks are of unequal length."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        parts = documents_of(index)
        left = SEQUENCE_LENGTH - sum(len(tokens) for tokens, _, _ in parts)
        rest = torch.zeros(left, dtype=torch.int64)
        columns = [torch.cat(column) for column in zip(*parts, (rest, rest, rest.float()), strict=True)]
        sizes = [*(len(tokens) for tokens, _, _ in parts), left]
        return {
            **dict(zip(("tokens", "labels", "loss_mask"), columns, strict=True)),
            "positions": torch.cat([torch.arange(size) for size in sizes]),
            "documents": torch.cat([torch.full((size,), i, dtype=torch.int32) for i, size in enumerate(sizes)]),
        }


def documents_of(index: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, labels and mask of each document of a sample."""
    generator = torch.Generator().manual_seed(index)
    parts = []
    for size in SIZES[index % len(SIZES)]:
        text = torch.randint(1, VOCAB_SIZE, (size + 1,), generator=generator)
        mask = torch.rand(size, generator=generator).gt(0.5).float()
        parts.append((text[:-1], text[1:], mask * (index % len(SIZES) != WITHOUT_LOSS)))
    return parts


def assert_equals_documents_alone(config: Config, results: Sequence[dict[str, Any]], num_samples: int) -> None:
    """Losses and every gradient of a packed batch are those of its documents, each alone in the plain model."""
    parameters = whole(result["parameters"] for result in results)
    losses, gradients = alone(config, parameters, range(num_samples))
    for result in results:
        for layer, loss in losses.items():
            np.testing.assert_allclose(result["figures"][f"train/exit_{layer}/loss"], loss, atol=1e-5, err_msg=layer)
    measured = whole(result["gradients"] for result in results)
    assert measured.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(measured[name], gradient, atol=1e-5 * scale, rtol=0, err_msg=name)


def alone(config: Config, parameters: Arrays, samples: Sequence[int]) -> tuple[Mapping[int, float], Arrays]:
    """Each exit's loss and every gradient, over the unmasked tokens of all samples."""
    weights = loss_weights(config.exits, config.model.num_layers, 0)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}
    parts = [part for index in samples for part in documents_of(index)]
    count = sum(float(mask.sum()) for _, _, mask in parts)
    losses = dict.fromkeys(weights, 0.0)
    for tokens, labels, mask in parts:
        total = torch.zeros((), requires_grad=True)
        logits = reference.exit_logits(leaves, config.model, config.exits, tokens[None])
        for layer, weight in weights.items():
            loss = (cross_entropy(logits[layer][0], labels, reduction="none") * mask).sum() / count
            losses[layer] += loss.item()
            total = total + weight * loss
        total.backward()
    return losses, {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}
