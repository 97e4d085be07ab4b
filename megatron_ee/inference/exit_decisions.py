"""Which rows leave at an exit: each as its own request says, whatever its neighbours do."""

import math
from collections.abc import Sequence

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.sequences import DecodingSequence


class ExitDecisions:
    """
    Attributes:
        num_nan: how often a confidence was no number, so that the exit did not fire.
    """

    def __init__(self, model: OpenedModel) -> None:
        self._model = model
        self.num_nan = 0

    def leaving(self, asked: AskedExit, sequences: Sequence[DecodingSequence]) -> list[float | None]:
        """The exit's confidence where it fires, and None where it does not.

        Args:
            sequences: of the exit's rows; it may fire for each of them.
        """
        for row, sequence in enumerate(sequences):
            if sequence.request.sampling.exit_logprobs:
                sequence.passed[asked.layer] = asked.logits_NV[row]
        confidences, choices = self._confidences(asked, sequences), self._choices(asked, sequences)
        leaving: list[float | None] = []
        for sequence, confidence, choice in zip(sequences, confidences, choices, strict=True):
            self.num_nan += math.isnan(confidence)
            in_a_row = 1 if choice is None else sequence.streak.see(choice)
            leaving.append(confidence if sequence.rule.fires(asked.layer, confidence, in_a_row) else None)
        return leaving

    def _confidences(self, asked: AskedExit, sequences: Sequence[DecodingSequence]) -> list[float]:
        rows_of: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows_of.setdefault(sequence.rule.measure, []).append(row)
        confidences = [0.0] * len(sequences)
        for measure, rows in rows_of.items():
            found = self._model.measure_named(measure)(asked.of(rows)).tolist()
            for row, confidence in zip(rows, found, strict=True):
                confidences[row] = confidence
        return confidences

    def _choices(self, asked: AskedExit, sequences: Sequence[DecodingSequence]) -> list[int | None]:
        """The likeliest tokens, of the rows whose rules look at them."""
        choices: list[int | None] = [None] * len(sequences)
        if rows := [row for row, sequence in enumerate(sequences) if sequence.rule.needs_choices]:
            for row, choice in zip(rows, asked.of(rows).logits_NV.argmax(-1).tolist(), strict=True):
                choices[row] = choice
        return choices
