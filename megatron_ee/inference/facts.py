"""What has to be known of the whole model, also where a process holds only a stage of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from megatron_ee.inference.savings import Weights
from megatron_ee.model.stage import Stage

Sizes = Mapping[int, int]
"""By layer; the final output is the exit after the last one. Of all tensor-parallel ranks together, so that what is
decided by them does not depend on their number."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """
    Attributes:
        layers, keys_and_values, features, projections: see `Weights`.
        vocabulary: rows of exits' projections.
        gated: exits with a gate.
        attending: exits whose heads have a block that attends.
    """

    layers: Sizes = field(default_factory=dict)
    keys_and_values: Sizes = field(default_factory=dict)
    features: Sizes = field(default_factory=dict)
    projections: Sizes = field(default_factory=dict)
    vocabulary: Sizes = field(default_factory=dict)
    gated: frozenset[int] = frozenset()
    attending: frozenset[int] = frozenset()

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Of all stages together."""
        return cls(*(_union([getattr(part, of.name) for part in parts]) for of in fields(cls)))

    @property
    def weights(self) -> Weights:
        layers = sorted(self.layers)
        return Weights(
            tuple(self.layers[layer] for layer in layers),
            tuple(self.keys_and_values[layer] for layer in layers),
            self.features,
            self.projections,
        )


def facts_of(stage: Stage) -> ModelFacts:
    """Of a stage's own layers and exits."""
    ranks = stage.tp_group.size()

    def size(module: Any) -> int:
        return sum(_bytes(parameter, ranks) for parameter in module.parameters())

    exits = sorted(int(layer) for layer in stage.exits)
    norm = size(stage.norm) if stage.norm is not None else 0
    gates_and_projections = {
        layer: sum(size(part) for part in (stage.head(layer).gate, stage.head(layer).output) if part is not None)
        for layer in exits
    }
    layers: dict[int, Any] = {int(number): layer for number, layer in stage.layers.items()}
    queries = stage.config.num_attention_heads // stage.config.num_query_groups
    return ModelFacts(
        {number: size(layer) for number, layer in layers.items()},
        {  # a key and a value for each group of queries
            number: size(layer.self_attention.linear_qkv) * 2 // (queries + 2) for number, layer in layers.items()
        },
        {layer: size(stage.head(layer)) - gates_and_projections[layer] + norm for layer in exits},
        {layer: _bytes(stage.projection_weight(layer), ranks) for layer in exits},
        {layer: int(stage.projection_weight(layer).shape[0]) * ranks for layer in exits},
        frozenset(layer for layer in exits if stage.head(layer).gate is not None),
        frozenset(layer for layer in exits if stage.head(layer).attends),
    )


def _union(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], frozenset):
        return frozenset().union(*parts)
    return {layer: size for part in parts for layer, size in part.items()}


def _bytes(parameter: Any, ranks: int) -> int:
    """Of a matrix all shares; a norm is the same on all ranks."""
    return int(parameter.nbytes) * (ranks if getattr(parameter, "tensor_model_parallel", False) else 1)
