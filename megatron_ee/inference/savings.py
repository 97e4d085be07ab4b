"""What exits saved and what they cost, beside full depth, counted from what was run. Imports no torch.

Bytes are of weights that a launch reads, each launch once; arithmetic is rows times weights, which is what products
with matrices cost. Keys and values, which attention reads, are in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ee.inference.work import Segment, Work


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


def _over(counts: Mapping[Segment, int], layers: tuple[int, ...]) -> int:
    return sum(count * sum(layers[start:stop]) for (start, stop), count in counts.items())


def _of_heads(counts: Mapping[int, int], sizes: Mapping[int, int]) -> int:
    return sum(count * sizes[layer] for layer, count in counts.items())
