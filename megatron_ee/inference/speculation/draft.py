"""One request's draft, from its first token to what full depth says of it.

Shapes: V vocabulary.
"""

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Draft:
    """
    Attributes:
        layer: the exit that drafts.
        length: most tokens.
        tokens: so far.
        probabilities: p_V that each was drawn from; of a greedy request none.
        passed: logits_V of the exit at each position that it was asked, where the request wants to know.
        stops: its last token is a stop token.
        is_over: nothing is drafted after it: it has its length or ends with a stop token, or the exit has nothing to
            say.
        joins: it is over, and all of it waits at its exit; else the last token has not entered the model yet.
        num_rows: positions at which full depth answers: before each token, and, unless a stop token is the last, after
            all of them.
    """

    layer: int
    length: int
    tokens: list[int] = field(default_factory=list)
    probabilities: list[torch.Tensor] = field(default_factory=list)
    passed: list[torch.Tensor] = field(default_factory=list)
    is_over: bool = False
    joins: bool = False
    stops: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.tokens) + (not self.stops)
