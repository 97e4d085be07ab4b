"""Which rows leave at an exit: each as its own request says, whatever its neighbours do."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.sequences import DecodingSequence


class ExitDecision(NamedTuple):
    """
    Attributes:
        leaves: whether the exit fires.
        choice: the likeliest token, where the rule looks at it.
    """

    leaves: bool
    confidence: float
    choice: int | None


class ExitDecisions:
    """
    Attributes:
        num_nan: how often a confidence was no number, so that the exit did not fire.
    """

    def __init__(self, model: OpenedModel) -> None:
        self._model = model
        self.num_nan = 0

    def of(self, asked: AskedExit, sequences: Sequence[DecodingSequence]) -> list[ExitDecision]:
        """
        Args:
            sequences: of the exit's rows; it may fire for each of them.
        """
        for row, sequence in enumerate(sequences):
            if sequence.wants_passed:
                sequence.passed[asked.layer] = asked.logits[row]
        decisions = []
        for sequence, confidence, choice in zip(sequences, *self._look(asked, sequences), strict=True):
            self.num_nan += math.isnan(confidence)
            in_a_row = 1 if choice is None else sequence.streak.with_next(choice)
            leaves = sequence.rule.fires(asked.layer, confidence, in_a_row)
            decisions.append(ExitDecision(leaves, confidence, choice))
        return decisions

    def _look(self, asked: AskedExit, sequences: Sequence[DecodingSequence]) -> tuple[list[float], list[int | None]]:
        """Confidences and, where a rule looks at them, the likeliest tokens: one copy from the device."""
        rows_of: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows_of.setdefault(sequence.rule.measure, []).append(row)
        answers = [self._model.measures[measure](asked.of(rows)) for measure, rows in rows_of.items()]
        choosing = [row for row, sequence in enumerate(sequences) if sequence.rule.needs_choices]
        if choosing:
            answers.append(asked.of(choosing).logits.argmax(-1))
        if len(answers) == 1:
            return answers[0].tolist(), [None] * len(sequences)
        numbers = iter(torch.cat([answer.double() for answer in answers]).tolist())  # fp64 holds any token's number
        confidences = {row: next(numbers) for rows in rows_of.values() for row in rows}
        choices = dict(zip(choosing, map(int, numbers), strict=True))
        return [confidences[row] for row in range(len(sequences))], [choices.get(row) for row in range(len(sequences))]
