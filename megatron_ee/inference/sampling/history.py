"""Which tokens a request has and how often its answer has each: what penalties are counted by.

Shapes: T different tokens.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]


class History:
    """Grows with the answer, at a cost that does not grow with it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens_T: Tokens = np.unique(np.array(prompt, dtype=np.int64))
        self._counts_T: Counts = np.zeros_like(self._tokens_T)  # both have room to grow
        self._places = {int(token): place for place, token in enumerate(self._tokens_T)}

    def extend(self, tokens: Iterable[int]) -> None:
        """More of the answer."""
        for token in tokens:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens_T):
                self._grow()
            self._tokens_T[place] = token
            self._counts_T[place] += 1

    def counted(self, drafted: Sequence[int] = ()) -> tuple[Tokens, Counts]:
        """
        Args:
            drafted: tokens that the answer may go on with.

        Returns:
            The tokens of prompt and answer, each once, and how often the answer has each; views of what may change.
        """
        tokens_T, counts_T = self._tokens_T[: len(self._places)], self._counts_T[: len(self._places)]
        if not drafted:
            return tokens_T, counts_T
        more = Counter(drafted)
        new = [token for token in more if token not in self._places]
        counts_T = np.concatenate((counts_T, np.array([more[token] for token in new], dtype=np.int64)))
        for token in more.keys() - set(new):
            counts_T[self._places[token]] += more[token]
        return np.concatenate((tokens_T, np.array(new, dtype=np.int64))), counts_T

    def _grow(self) -> None:
        room = np.zeros(max(64, len(self._tokens_T)), dtype=np.int64)
        self._tokens_T = np.concatenate((self._tokens_T, room))
        self._counts_T = np.concatenate((self._counts_T, room))
