"""Positions that have not been through all layers, and so lack keys and values in the deeper ones.

Policy *recompute* (exact): keep each one's hidden state where it stopped. When a later token goes deeper, they join it
in that segment; nothing shallow is computed twice.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Rows:
    """Positions of one depth, ascending, with their hidden states x_SBH (B is 1)."""

    positions: list[int]
    hidden_SBH: torch.Tensor


class PendingPositions:
    """Hidden states by depth (number of layers run). What is deepest arrived first, so each depth stays in order."""

    def __init__(self) -> None:
        self._by_depth: dict[int, Rows] = {}

    def __len__(self) -> int:
        return sum(len(rows.positions) for rows in self._by_depth.values())

    def add(self, depth: int, rows: Rows) -> None:
        """Positions that have now run `depth` layers; they come after those that wait there."""
        waiting = self._by_depth.get(depth)
        if waiting is not None:
            assert waiting.positions[-1] < rows.positions[0], "a later position was here before an earlier one"
            rows = Rows(waiting.positions + rows.positions, torch.cat((waiting.hidden_SBH, rows.hidden_SBH)))
        self._by_depth[depth] = rows

    def take(self, depth: int) -> Rows | None:
        """Remove and return all that wait at a depth."""
        return self._by_depth.pop(depth, None)
