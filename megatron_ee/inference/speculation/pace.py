"""Where a request drafts, and how far: by its own acceptance so far, so that no neighbour and no clock has a say.

An exit is expected to be wrong the more often, the more of the model it leaves out: 1 - a = m (1 - E / L), where E / L
is its share of the costs. All exits together tell m, so that each need not fail by itself; what an exit has shown by
itself counts beside that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ee.inference.speculation.law import DraftCosts, best_length, gain

MOST_DRAFTED = 12
"""The longest draft that is chosen without being asked for."""
_EXPECTED = 0.5  # m, before anything is known
_WEIGHT = 4.0  # it is worth so many tested tokens of an exit that leaves out everything
_OWN_WEIGHT = 8.0  # and what m says of an exit so many of its own
_KEPT = 0.99  # what a cycle leaves of older evidence: texts change, and an exit that failed is tried again


@dataclass(slots=True)
class _Evidence:
    tested: float = 0.0
    accepted: float = 0.0


class Pace:
    """
    Args:
        costs: of each exit that may draft.
        length: tokens of a draft; None: as many as pay, and none where none does.
        most: tokens of a draft whose length is not given.
    """

    def __init__(self, costs: Mapping[int, DraftCosts], length: int | None, most: int = MOST_DRAFTED) -> None:
        self._costs, self._length, self._most = costs, length, most
        self._evidence = {layer: _Evidence() for layer in costs}

    def next(self, room: int) -> tuple[int, int]:
        """The exit that drafts, and how many tokens, `room` at most; 0 for a token at full depth."""
        wrong = self._wrong()
        gains = {layer: self._best(layer, wrong, room) for layer in self._costs}
        layer = max(gains, key=lambda layer: gains[layer][0])
        return layer, min(room, gains[layer][1])

    def see(self, layer: int, *, drafted: int, accepted: int) -> None:
        """What full depth has said of a draft; also of none, where there was to be none."""
        for evidence in self._evidence.values():
            evidence.tested *= _KEPT
            evidence.accepted *= _KEPT
        evidence = self._evidence[layer]
        evidence.tested += min(drafted, accepted + 1)  # what comes after the first wrong one is not tested
        evidence.accepted += accepted

    def _best(self, layer: int, wrong: float, room: int) -> tuple[float, int]:
        acceptance, costs = self._acceptance(layer, wrong), self._costs[layer]
        if self._length is not None:
            return gain(acceptance, self._length, costs), self._length
        return best_length(acceptance, costs, min(room, self._most))

    def _wrong(self) -> float:
        """m, as all exits tell it."""
        wrong = sum(of.tested - of.accepted for of in self._evidence.values())
        left_out = sum(of.tested * self._costs[layer].share_left_out for layer, of in self._evidence.items())
        return (wrong + _EXPECTED * _WEIGHT) / (left_out + _WEIGHT)

    def _acceptance(self, layer: int, wrong: float) -> float:
        own, expected = self._evidence[layer], max(0.0, 1 - wrong * self._costs[layer].share_left_out)
        return (own.accepted + expected * _OWN_WEIGHT) / (own.tested + _OWN_WEIGHT)
