"""What a run warns of, without ending: a loss that leaps, and a rank that is slower than those with the same work."""

import logging
import math
import platform
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from megatron_ee.config import FaultsConfig
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.losses import ExitLoss

_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

_FEWEST = 10


class SpikeAlarm:
    """Compares each loss with the median of those before it, in deviations that a few odd ones do not widen.

    Args:
        deviations: how many above the median are a spike; 0: none is.
        window: how many losses the median is of, at most; before there are ten, or all of a smaller window, no alarm.
    """

    def __init__(self, *, deviations: float, window: int) -> None:
        self._deviations = deviations
        self._losses = deque[float](maxlen=window)
        self._fewest = min(_FEWEST, window)

    def hear(self, loss: float) -> str:
        """The warning that a step's loss asks for; "" for none. Losses that are no numbers are others' business."""
        if not math.isfinite(loss) or not self._deviations:
            return ""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < self._fewest:
            return ""
        middle = median(before)
        deviation = _SIGMA * median(abs(of - middle) for of in before)
        if loss <= middle + self._deviations * deviation or deviation == 0.0:
            return ""
        above = (loss - middle) / deviation
        return f"the last exit's loss is {loss:.4f}, {above:.0f} deviations above {middle:.4f}, its median of late"


def slowness(busy_s: Sequence[float], *, num_stages: int) -> list[float]:
    """How many times the median of the other ranks of its stage each rank is at work; 1 where there are none.

    Args:
        busy_s: of each rank, in a step: stage by stage, the ranks of a stage having the same to do.
    """
    ranks_per_stage, ratios = len(busy_s) // num_stages, []
    for rank, seconds in enumerate(busy_s):
        first = rank - rank % ranks_per_stage
        others = [*busy_s[first:rank], *busy_s[rank + 1 : first + ranks_per_stage]]
        usual = median(others) if others else seconds
        ratios.append(seconds / usual if usual > 0.0 else 1.0)
    return ratios


class Alarms:
    """Both alarms of a run; the main rank warns. Every rank calls the same methods in the same order."""

    def __init__(self, config: FaultsConfig, mesh: Mesh, *, last_exit: int) -> None:
        self._mesh, self._last_exit, self._ratio = mesh, last_exit, config.straggler_ratio
        self._spikes = SpikeAlarm(deviations=config.spike_deviations, window=config.spike_window)
        self._stragglers: set[int] = set()
        self._hosts = mesh.gather(platform.node())
        self._own: torch.Tensor | None = None
        self._num_tokens = 0.0

    @property
    def own_cross_entropy(self) -> torch.Tensor | None:
        """This rank's share of the sum that `hear` wants, of the step that was noted last."""
        return self._own

    def note(self, losses: Mapping[int, ExitLoss], num_tokens: float) -> None:
        """A step's losses on this rank, and the tokens that all ranks' are of."""
        if self._mesh.tensor_rank == 0 and self._last_exit in losses:  # tensor-parallel ranks have the same losses
            self._own = losses[self._last_exit].cross_entropy
        self._num_tokens = num_tokens

    def hear(self, iteration: int, cross_entropy: float) -> None:
        """What the last exit's losses of the step that was noted come to; without one it is left alone."""
        if self._num_tokens and (warning := self._spikes.hear(cross_entropy / self._num_tokens)):
            self._warn(iteration, warning)
        self._own, self._num_tokens = None, 0.0

    def compare(self, iteration: int, busy_s: Sequence[float], *, num_stages: int) -> dict[str, float]:
        """Look for stragglers; returns the figure of the slowest rank, where ranks share a stage's work."""
        if len(busy_s) == num_stages:
            return {}
        ratios = slowness(busy_s, num_stages=num_stages)
        late = {rank for rank, ratio in enumerate(ratios) if 0.0 < self._ratio < ratio}
        for rank in sorted(late - self._stragglers):
            others = f"{ratios[rank]:.2f} times as long at its work as the other ranks of its stage"
            self._warn(iteration, f"rank {rank} on {self._hosts[rank]} is {others}")
        self._stragglers = late
        return {"perf/slowest_rank_ratio": max(ratios)}

    def _warn(self, iteration: int, what: str) -> None:
        if self._mesh.is_main:
            logging.getLogger("megatron_ee").warning("iteration %d: %s", iteration, what)
