"""What the exits of a model say of every token of a text, teacher-forced: one pass through all layers.

Shapes: E exits, N tokens, B windows, S positions, H hidden size, V the tokenizer's vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.opened import OpenedModel

_BATCH = 8  # windows
_ROWS = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True, slots=True)
class Observed:
    """Of each exit at each token: confidences by measure (gates' of the exits that have one), and whether its choice is
    the final exit's, or the label; and whether the final exit's choice is the label."""

    confidences_EN: dict[str, np.ndarray]
    agrees_EN: np.ndarray
    correct_EN: np.ndarray
    final_correct_N: np.ndarray


def exits_asked(model: OpenedModel) -> dict[str, list[int]]:
    """Measure -> the exits that it can be asked of: gates of those that have one, everything else of all."""
    asked = {
        name: [layer for layer in model.exits if name != "gate" or layer in model.gated] for name in model.measures
    }
    return {name: layers for name, layers in asked.items() if layers}


@torch.inference_mode()
def observe(model: OpenedModel, windows_BS: np.ndarray) -> Observed:
    """One forward of every window, a few at a time; of each, the last token is only a label."""
    parts = [
        _observe(model, torch.from_numpy(part)) for part in np.split(windows_BS, range(_BATCH, len(windows_BS), _BATCH))
    ]

    def joined(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values, axis=1)

    return Observed(
        {name: joined([part.confidences_EN[name] for part in parts]) for name in parts[0].confidences_EN},
        joined([part.agrees_EN for part in parts]),
        joined([part.correct_EN for part in parts]),
        np.concatenate([part.final_correct_N for part in parts]),
    )


def ask_all(
    model: OpenedModel, tokens_BS: torch.Tensor, *, rows: int | None = None
) -> Iterator[tuple[int, Iterator[AskedExit]]]:
    """Each exit, the final one last, with all tokens (position after position), some rows at a time."""
    stage, num_layers = model.stage, model.stage.model.num_layers
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    x_SBH = stage.embed(tokens_BS)
    for start, stop in pairwise((0, *model.exits, num_layers)):
        y_SBH, taps = stage.run_layers(x_SBH, positions, start, stop)
        hidden_SBH = taps[stage.tap_of(stop)]
        features_SBH = stage.exit_features(hidden_SBH, stop, positions)
        yield stop, _in_parts(model, stop, rows or _ROWS, hidden_SBH, y_SBH, x_SBH, features_SBH)
        x_SBH = y_SBH


def _observe(model: OpenedModel, windows_BS: torch.Tensor) -> Observed:
    windows_BS = windows_BS.to(next(model.stage.parameters()).device)
    tokens_BS, labels_SB = windows_BS[:, :-1], windows_BS[:, 1:].T
    asked_of = exits_asked(model)
    choices: list[torch.Tensor] = []
    confidences: dict[str, list[torch.Tensor]] = {name: [] for name in asked_of}
    for layer, parts in ask_all(model, tokens_BS):
        choices_N, says = _hear(model, parts, [name for name, layers in asked_of.items() if layer in layers])
        choices.append(choices_N)
        for name, confidence_N in says.items():
            confidences[name].append(confidence_N)
    *early, final_N = choices

    def stacked(values: list[torch.Tensor]) -> np.ndarray:
        return torch.stack(values).cpu().numpy()

    labels_N = labels_SB.flatten()
    agrees, correct = ([of == truth_N for of in early] for truth_N in (final_N, labels_N))
    return Observed(
        {name: stacked(values) for name, values in confidences.items()},
        stacked(agrees),
        stacked(correct),
        (final_N == labels_N).cpu().numpy(),
    )


def _hear(
    model: OpenedModel, parts: Iterator[AskedExit], measures: list[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One exit's choices [N], and its confidences [N] by measure."""
    choices: list[torch.Tensor] = []
    says: dict[str, list[torch.Tensor]] = {name: [] for name in measures}
    for asked in parts:
        choices.append(asked.logits.argmax(-1))
        for name, values in says.items():
            values.append(model.measures[name](asked).float())
    return torch.cat(choices), {name: torch.cat(values) for name, values in says.items()}


def _in_parts(model: OpenedModel, layer: int, rows: int, *states: torch.Tensor) -> Iterator[AskedExit]:
    flat = [state_SBH.flatten(0, 1) for state_SBH in states]
    for first in range(0, len(flat[0]), rows):
        hidden_NH, output_NH, previous_NH, features_NH = (state_NH[first : first + rows] for state_NH in flat)
        yield AskedExit(
            model.runner,
            layer,
            hidden_NH=hidden_NH,
            output_NH=output_NH,
            previous_NH=previous_NH,
            features_NH=features_NH,
        )
