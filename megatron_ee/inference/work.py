"""What decoding has run, counted as it runs. Imports no torch."""

from collections import Counter
from dataclasses import dataclass, field, fields

Segment = tuple[int, int]
"""Layers `start + 1` to `stop`."""


@dataclass(slots=True)
class Work:
    """Launches, and rows in them.

    Attributes:
        prefills: launches of parts of prompts alone.
        rounds: launches that begin with new tokens and end with one or more for each sequence.
        turns: sequences in these, added up.
        drafts: launches that begin with new tokens and end where an exit drafts.
        drafted: their rows.
        taken_back: positions that were drafted in vain.
        launches, rows: of layers, by segment.
        stores, stored: of keys and values that were made without running the layers of a segment.
        features, feature_rows: of heads before their projections, by exit; the final output is the last one.
        projections, projected: of heads' projections, by exit.
    """

    prefills: int = 0
    rounds: int = 0
    turns: int = 0
    drafts: int = 0
    drafted: int = 0
    taken_back: int = 0
    launches: Counter[Segment] = field(default_factory=Counter)
    rows: Counter[Segment] = field(default_factory=Counter)
    stores: Counter[Segment] = field(default_factory=Counter)
    stored: Counter[Segment] = field(default_factory=Counter)
    features: Counter[int] = field(default_factory=Counter)
    feature_rows: Counter[int] = field(default_factory=Counter)
    projections: Counter[int] = field(default_factory=Counter)
    projected: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __sub__(self, earlier: "Work") -> "Work":
        """What has been run since."""
        return Work(*(getattr(self, part.name) - getattr(earlier, part.name) for part in fields(self)))
