"""Special tokens: what only a template may write."""

from typing import NamedTuple


class SpecialToken(NamedTuple):
    """
    Attributes:
        strips_left, strips_right: blanks beside it belong to it, and make no tokens of their own.
    """

    id: int
    strips_left: bool = False
    strips_right: bool = False
