"""Loss, accuracy and depth on a text, at every exit and by every mode: one pass over it, whatever is asked.

Shapes: N tokens, B windows, S positions.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from evaluate_exits import Answers, Said, TeacherForced
from evaluate_modes import Mode
from evaluate_results import Cell

from megatron_ee.inference.opened import OpenedModel

_BATCH = 8  # windows


class Text(NamedTuple):
    """
    Attributes:
        windows_BS: of tokens; of each, the last one is only a label.
    """

    name: str
    windows_BS: np.ndarray

    @property
    def digest(self) -> str:
        """Says whether it is the very same text, cut in the same way."""
        return hashlib.sha256(f"{self.windows_BS.shape}".encode() + self.windows_BS.tobytes()).hexdigest()


def rows_of(exits: Sequence[int], modes: Sequence[Mode]) -> list[str]:
    """What a text is evaluated by, as its cells are called: all early exits, then the modes but for drafts, which say
    what full depth says."""
    return [*map(exit_name, exits), *(mode.name for mode in modes if mode.exit.mode != "speculative")]


def exit_name(layer: int) -> str:
    return f"exit {layer}"


def evaluate_text(
    model: OpenedModel, text: Text, modes: Sequence[Mode], wanted: Sequence[str], done: Callable[[int], object]
) -> list[Cell]:
    """A cell for each row that is wanted, of `rows_of`.

    Args:
        done: is told of so many more tokens.

    Raises:
        FieldError: see `TeacherForced`.
    """
    asked = TeacherForced(model, modes, every_exit=True)
    final = model.stage.model.num_layers
    tallies = {name: _Tally() for name in rows_of(model.exits, modes) if name in wanted}
    for start in range(0, len(text.windows_BS), _BATCH):
        windows_BS = text.windows_BS[start : start + _BATCH]
        said = asked.said(windows_BS.tolist(), [windows_BS.shape[1] - 1] * len(windows_BS))
        for name, (answers, depths_N) in _rows(asked, said, model.exits, modes).items():
            if name in tallies:
                tallies[name].add(answers, depths_N, said.labels_N, said.layers[final].choices_N)
        done(len(said.labels_N))
    rules_out = {mode.name for mode in modes if mode.exit.mode == "dola" and mode.exit.dola.relative_top > 0}
    return [
        Cell(
            "text",
            text.name,
            name,
            tally.figures(has_loss=name not in rules_out),
            tally.mean_depth,
            dict(sorted(tally.depths.items())),
        )
        for name, tally in tallies.items()
    ]


def _rows(
    asked: TeacherForced, said: Said, exits: Sequence[int], modes: Sequence[Mode]
) -> Mapping[str, tuple[Answers, np.ndarray]]:
    rows = {exit_name(layer): (said.layers[layer], np.full(len(said.labels_N), layer)) for layer in exits}
    for mode in modes:
        outcome = asked.outcome(mode, said)
        rows[mode.name] = outcome.answers, outcome.depths_N
    return rows


@dataclass(slots=True)
class _Tally:
    """Sums over the tokens of a text."""

    tokens: int = 0
    nats: float = 0.0
    right: int = 0
    agreed: int = 0
    depths: Counter[int] = field(default_factory=Counter)

    def add(self, answers: Answers, depths_N: np.ndarray, labels_N: np.ndarray, final_N: np.ndarray) -> None:
        """
        Args:
            final_N: what full depth chooses.
        """
        self.tokens += len(labels_N)
        self.nats += float(answers.nats_N.sum())
        self.right += int((answers.choices_N == labels_N).sum())
        self.agreed += int((answers.choices_N == final_N).sum())
        self.depths.update(depths_N.tolist())

    def figures(self, *, has_loss: bool) -> dict[str, float]:
        """Loss in nats a token; none where tokens are ruled out, which no loss survives."""
        loss = self.nats / self.tokens
        likely = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))} if has_loss else {}
        shares = {"accuracy": self.right / self.tokens, "agreement": self.agreed / self.tokens}
        return {**likely, **shares, "tokens": self.tokens}

    @property
    def mean_depth(self) -> float:
        return sum(layer * count for layer, count in self.depths.items()) / self.tokens
