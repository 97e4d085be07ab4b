"""What exits would say of texts at full depth, and where tokens leave by it: every threshold without decoding again."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving_costs import Machine

from megatron_ee.config import ExitParams
from megatron_ee.inference.exit_rule import ExitRule, Streak

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Saying(NamedTuple):
    """What one exit says of one token.

    Attributes:
        agrees: it is full depth's choice.
    """

    choice: int
    confidence: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class Heard:
    """A text of full depth.

    Attributes:
        prompt: its tokens' number.
        tokens: of each new token, what exits say of it, ascending by layer.
    """

    prompt: int
    tokens: Sequence[Mapping[int, Saying]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One threshold.

    Attributes:
        depths: of each text's tokens.
        agreement: the share of all tokens that stay what they are, given the same text before them.
        exits: at which tokens are looked at.
    """

    threshold: float
    depths: Sequence[tuple[int, ...]]
    agreement: float
    exits: tuple[int, ...]

    @property
    def mean_depth(self) -> float:
        return statistics.mean(depth for of in self.depths for depth in of)


def cells_of(texts: Sequence[Heard], params: ExitParams, machine: Machine, gated: Sequence[int]) -> list[Cell]:
    """One for each threshold.

    Raises:
        FieldError: see `ExitRule`.
    """
    cells = []
    for threshold in THRESHOLDS:
        changed = {"mode": "early_exit", "threshold": threshold, "thresholds": {}}
        rule = ExitRule(params.model_copy(update=changed), machine.exits, gated)
        left = [[_leave(token, rule, machine.num_layers) for token in text.tokens] for text in texts]
        agreed = [agrees for of in left for _, agrees in of]
        depths = [tuple(depth for depth, _ in of) for of in left]
        cells.append(Cell(threshold, depths, sum(agreed) / len(agreed), rule.stops_at(machine.exits)))
    return cells


def _leave(token: Mapping[int, Saying], rule: ExitRule, num_layers: int) -> tuple[int, bool]:
    """The layer after which a token leaves, and whether it stays what it is."""
    streak = Streak()
    for layer in rule.thresholds:
        said = token[layer]
        if rule.fires(layer, said.confidence, streak.see(said.choice)):
            return layer, said.agrees
    return num_layers, True
