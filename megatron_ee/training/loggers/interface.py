"""What a destination of figures is."""

from collections.abc import Mapping
from typing import Protocol

Figures = Mapping[str, float]
"""Names to numbers; `megatron_ee.training.loggers` has the list of names."""


class Logger(Protocol):
    """One destination. The main rank alone calls it."""

    def log(self, iteration: int, figures: Figures) -> None:
        """Take the figures of `iteration`, the number of iterations done. It never goes down; training and validation
        may come one after the other with the same number."""
        ...

    def close(self) -> None:
        """Write what is still held, and let go."""
        ...
