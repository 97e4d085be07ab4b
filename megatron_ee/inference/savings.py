"""What exits saved and what they cost, beside full depth, counted from what was run. Imports no torch.

Bytes are of weights that a launch reads, each launch once; arithmetic is rows times weights, which is what products
with matrices cost. Keys and values, which attention reads, are in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ee.inference.work import Segment, Work

if TYPE_CHECKING:
    from megatron_ee.model.stage import Stage


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's parameters.

    Attributes:
        layers: of each layer, the first one first.
        keys_and_values: of those, what makes keys and values.
        features: exit -> of its head before the projection; the final output is the exit after the last layer.
        projections: exit -> of its projection, also where exits share it.
    """

    layers: tuple[int, ...]
    keys_and_values: tuple[int, ...]
    features: Mapping[int, int]
    projections: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Savings:
    """Shares are of what full depth reads or computes in the layers, for the same tokens in the same batches.

    Attributes:
        bytes_at_full_depth: read of layers' weights.
        bytes_not_read: of those; negative where launches that only catch up read more than exits spared.
        head_bytes: read of heads, beyond the one head for each token that full depth reads.
        num_asked: launches of early exits' heads.
        arithmetic_saved: share that was never done.
        head_arithmetic: share that heads did beyond full depth's.
    """

    bytes_at_full_depth: int
    bytes_not_read: int
    head_bytes: int
    num_asked: int
    arithmetic_saved: float
    head_arithmetic: float

    @property
    def share_not_read(self) -> float:
        return self.bytes_not_read / self.bytes_at_full_depth

    @property
    def head_share(self) -> float:
        return self.head_bytes / self.bytes_at_full_depth


def savings_of(work: Work, weights: Weights, *, num_tokens: int) -> Savings:
    """
    Args:
        num_tokens: that the work made.
    """
    last, whole = len(weights.layers), sum(weights.layers)
    steps = work.rounds * num_tokens / work.turns  # a round that verifies drafts stands for several of full depth
    entered = work.prefills + steps
    rows = sum(count for (start, _), count in work.rows.items() if start == 0) - work.taken_back
    read = _over(work.launches, weights.layers) + _over(work.stores, weights.keys_and_values)
    done = _over(work.rows, weights.layers) + _over(work.stored, weights.keys_and_values)
    head = weights.features[last] + weights.projections[last]
    head_bytes = _of_heads(work.features, weights.features) + _of_heads(work.projections, weights.projections)
    head_work = _of_heads(work.feature_rows, weights.features) + _of_heads(work.projected, weights.projections)
    return Savings(
        bytes_at_full_depth=round(entered * whole),
        bytes_not_read=round(entered * whole) - read,
        head_bytes=head_bytes - round(steps * head),
        num_asked=sum(count for layer, count in work.features.items() if layer != last),
        arithmetic_saved=1 - done / (rows * whole),
        head_arithmetic=(head_work - num_tokens * head) / (rows * whole),
    )


def weights_of(stage: "Stage") -> Weights:
    """Of a whole model on one stage; with tensor parallelism, of all ranks together, so that what is decided by it does
    not depend on their number."""
    ranks, numbers = stage.tp_group.size(), range(1, stage.model.num_layers + 1)

    def size(module: Any) -> int:
        return sum(_bytes(parameter, ranks) for parameter in module.parameters())

    exits = sorted(int(layer) for layer in stage.exits)
    norm = size(stage.norm) if stage.norm is not None else 0
    gates_and_projections = {
        layer: sum(size(part) for part in (stage.head(layer).gate, stage.head(layer).output) if part is not None)
        for layer in exits
    }
    layers: list[Any] = [stage.layers[str(number)] for number in numbers]
    qkv = [size(layer.self_attention.linear_qkv) for layer in layers]
    queries = stage.config.num_attention_heads // stage.config.num_query_groups
    return Weights(
        tuple(map(size, layers)),
        tuple(of * 2 // (queries + 2) for of in qkv),  # a key and a value for each group of queries
        {layer: size(stage.head(layer)) - gates_and_projections[layer] + norm for layer in exits},
        {layer: _bytes(stage.projection_weight(layer), ranks) for layer in exits},
    )


def _over(counts: Mapping[Segment, int], layers: tuple[int, ...]) -> int:
    return sum(count * sum(layers[start:stop]) for (start, stop), count in counts.items())


def _of_heads(counts: Mapping[int, int], sizes: Mapping[int, int]) -> int:
    return sum(count * sizes[layer] for layer, count in counts.items())


def _bytes(parameter: Any, ranks: int) -> int:
    """Of a matrix all shares; a norm is the same on all ranks."""
    return int(parameter.nbytes) * (ranks if getattr(parameter, "tensor_model_parallel", False) else 1)
