"""What all ranks tell each other once in every step, in one small message."""

from dataclasses import dataclass

import torch

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.operations.stopping import REASONS


@dataclass(frozen=True, slots=True)
class Answers:
    """The same on all ranks.

    Attributes:
        reason: to stop; "" for none.
        is_writing: whether any rank still writes a checkpoint.
        cross_entropy: the sum of what each rank had.
    """

    reason: str
    is_writing: bool
    cross_entropy: float


def call_roll(mesh: Mesh, *, reason: int, is_writing: bool, cross_entropy: torch.Tensor | None) -> Answers:
    """Collective.

    Args:
        reason: this rank's to stop, a place in REASONS; where ranks differ, the last one counts.
        cross_entropy: this rank's share of a scalar that is summed; None: it has none.
    """
    own = torch.zeros(len(REASONS) + 2, dtype=torch.float64)
    own[reason] = 1.0
    own[-2] = float(is_writing)
    own = own.to(mesh.device.torch)
    if cross_entropy is not None:
        own[-1] = cross_entropy
    *given, writing, summed = mesh.sum_over_ranks(own).tolist()
    last = max((place for place, count in enumerate(given) if count), default=0)
    return Answers(REASONS[last], writing > 0, summed)
