"""Which blocks hold the keys and values of how texts begin, so that another text that begins so need not run it again.

Plain Python. Whole blocks only, found by their tokens and all tokens before them.
"""

from collections.abc import Hashable, Sequence
from itertools import count

_Node = Hashable


class Prefixes:
    """A tree of blocks; a block is in it until somebody takes it for something else. There is one block for a text, and
    never more nodes than blocks.

    Args:
        size: positions of a block.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._block_after: dict[tuple[_Node, tuple[int, ...]], tuple[int, int]] = {}
        self._place_of: dict[int, tuple[_Node, tuple[int, ...]]] = {}
        self._numbers = count()

    def __contains__(self, block: int) -> bool:
        return block in self._place_of

    def __len__(self) -> int:
        return len(self._place_of)

    def find(self, tokens: Sequence[int], kind: Hashable) -> list[int]:
        """The blocks that hold the first of these tokens, as many as are known.

        Args:
            kind: texts of another one have other keys and values.
        """
        blocks: list[int] = []
        node: _Node = kind
        for piece in self._pieces(tokens):
            if (known := self._block_after.get((node, piece))) is None:
                break
            node, block = known
            blocks.append(block)
        return blocks

    def add(self, tokens: Sequence[int], kind: Hashable, blocks: Sequence[int]) -> None:
        """These blocks hold these tokens, of which what doesn't fill a block is left out. What is known stays with the
        blocks that it has."""
        node: _Node = kind
        for piece, block in zip(self._pieces(tokens), blocks, strict=False):
            if (known := self._block_after.get((node, piece))) is None:
                self.forget(block)  # it may be left from where what comes before it was forgotten
                known = next(self._numbers), block
                self._block_after[node, piece], self._place_of[block] = known, (node, piece)
            node = known[0]

    def forget(self, block: int) -> None:
        """It will hold something else. What comes after it cannot be found any more."""
        if (place := self._place_of.pop(block, None)) is not None:
            del self._block_after[place]

    def _pieces(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        whole = len(tokens) // self._size * self._size
        return [tuple(tokens[start : start + self._size]) for start in range(0, whole, self._size)]
