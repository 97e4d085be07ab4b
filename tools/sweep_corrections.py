"""How far exits should correct full depth's logits (SLED): next tokens of a text that are right, teacher-forced.

All tokens run once through all layers; every alpha and top_k is tried on the logits that exits have there. The loss is
the cross-entropy with the tokens beyond the top_k as full depth has them: decoding rules them out, which no loss
survives.

Shapes: N tokens, V vocabulary, B windows, S positions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from exit_observations import ask_all
from sweep_results import Panel, Swept, as_cells
from sweep_timing import deviations_needed, progress
from torch.nn.functional import cross_entropy

from megatron_ee.config import ExitParams, SledParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.corrections import check_shared_vocabulary, sled
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.llm import LLM
from megatron_ee.inference.opened import OpenedModel

ALPHAS = (0.1, 0.3, 1.0, 2.0, 4.0)
TOP_KS = (2, 5, 10, 20)

_BATCH = 8  # windows
_NUMBERS = 2**25  # of logits that exist at a time

Setting = tuple[float, int]
"""alpha and top_k."""


@dataclass(frozen=True, slots=True)
class Full:
    """Full depth, over a number of tokens; loss is the mean cross-entropy in nats."""

    tokens: int
    accuracy: float
    loss: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting.

    Attributes:
        gained: tokens that are right and were not at full depth.
        lost: tokens that were right there, and are not.
        difference: of this accuracy and full depth's.
        standard_error: of the difference, which is a mean over tokens, each paired with itself.
    """

    alpha: float
    top_k: int
    accuracy: float
    loss: float
    gained: int
    lost: int
    difference: float
    standard_error: float

    @property
    def deviations(self) -> float:
        """The difference in standard errors; 0 where nothing differs."""
        return self.difference / self.standard_error if self.standard_error else 0.0


def sweep(llm: LLM, windows_BS: np.ndarray, *, alphas: Sequence[float], top_ks: Sequence[int]) -> Swept:
    """
    Args:
        windows_BS: of each, the last token is only a label.

    Raises:
        FieldError: a number is none that SLED takes, or an exit none of the model's.
    """
    settings = _settings(llm.config.inference.exit, alphas, top_ks)
    layers = ExitRule(next(iter(settings.values())), llm.model.exits, llm.model.gated).heard
    check_shared_vocabulary(llm.model.facts, "sled", layers)
    tried = {setting: params.sled for setting, params in settings.items()}
    full, cells = measure(llm.model, windows_BS, layers, tried)
    best = best_of(cells)
    content = {
        "full": as_cells([full])[0],
        "deviations_needed": deviations_needed(len(cells)),
        "cells": as_cells(cells),
    }
    chosen = ExitParams(mode="full") if best is None else settings[best.alpha, best.top_k]
    heading = (
        f"{full.tokens} tokens, exits {', '.join(map(str, layers))}; full depth: {full.accuracy:.2%} of next tokens"
    )
    lines = [f"{heading} right, loss {full.loss:.4f}", "", *table(cells), "", verdict(cells, full, best)]
    return Swept(lines, chosen, content, panels(cells, full, best))


@torch.inference_mode()
def measure(
    model: OpenedModel, windows_BS: np.ndarray, layers: Sequence[int], settings: Mapping[Setting, SledParams]
) -> tuple[Full, list[Cell]]:
    """Full depth, and a cell for each setting, over all tokens of the windows but the first of each.

    Args:
        layers: of the exits that are heard, all with their own heads or all without (`norm`).
    """
    (norm,) = {params.norm for params in settings.values()}
    full, tallies = _Tally(), {setting: _Tally() for setting in settings}
    with progress((windows_BS.shape[1] - 1) * len(windows_BS), "tokens") as done:
        for labels_N, final_NV, early in _all_logits(model, windows_BS, layers, norm=norm):
            was_right_N = full.add(final_NV, final_NV, labels_N)
            for setting, params in settings.items():
                evolved_NV = sled(final_NV, early, params)
                with_tail_NV = torch.where(evolved_NV == params.lower_bound, final_NV, evolved_NV)
                tallies[setting].add(evolved_NV, with_tail_NV, labels_N, was_right_N)
            done(len(labels_N))
    return full.as_full(), [tally.as_cell(*setting) for setting, tally in tallies.items()]


def best_of(cells: Sequence[Cell]) -> Cell | None:
    """The most accurate one of those that are above full depth by more than chance makes any of so many: of equals the
    one with the least loss, then with the smallest alpha. None: there is none."""
    above = [cell for cell in cells if cell.deviations > deviations_needed(len(cells))]
    return min(above, key=lambda cell: (-cell.accuracy, cell.loss, cell.alpha, cell.top_k), default=None)


def table(cells: Sequence[Cell]) -> list[str]:
    """Lines, a row for each cell."""
    lines = [
        f"{'alpha':>7}{'top_k':>7}{'accuracy':>10}{'loss':>9}{'gained':>8}{'lost':>7}{'difference':>12}{'s.e.':>8}"
    ]
    for cell in cells:
        lines.append(
            f"{cell.alpha:>7g}{cell.top_k:>7}{cell.accuracy:>10.2%}{cell.loss:>9.4f}{cell.gained:>8}{cell.lost:>7}"
            f"{cell.difference:>+12.3%}{cell.standard_error:>8.3%}"
        )
    return lines


def verdict(cells: Sequence[Cell], full: Full, best: Cell | None) -> str:
    """What it comes to, with how sure that is."""
    needed = f"one of {len(cells)} reaches {deviations_needed(len(cells)):.1f} by chance"
    if best is not None:
        return (
            f"Best: alpha {best.alpha:g} with top_k {best.top_k}: {best.accuracy:.2%} of next tokens are right, at "
            f"full depth {full.accuracy:.2%}. That is {best.deviations:.1f} standard errors of the difference "
            f"({needed})."
        )
    surest = max(cells, key=lambda cell: cell.deviations)
    return (
        f"Nothing beats full depth: what comes closest, alpha {surest.alpha:g} with top_k {surest.top_k}, has "
        f"{surest.difference:+.3%}, {surest.deviations:.1f} standard errors of the difference ({needed})."
    )


def panels(cells: Sequence[Cell], full: Full, best: Cell | None) -> list[Panel]:
    """Accuracy and loss over full depth's, by alpha and top_k."""
    alphas, top_ks = list(dict.fromkeys(c.alpha for c in cells)), list(dict.fromkeys(c.top_k for c in cells))
    of = {(cell.alpha, cell.top_k): cell for cell in cells}
    place = None if best is None else (alphas.index(best.alpha), top_ks.index(best.top_k))
    labels = ([f"{alpha:g}" for alpha in alphas], [str(top_k) for top_k in top_ks], "alpha", "top_k")
    right = [[of[alpha, top_k].difference for top_k in top_ks] for alpha in alphas]
    losses = [[of[alpha, top_k].loss - full.loss for top_k in top_ks] for alpha in alphas]
    title, note = "next tokens right, over full depth", f"full depth: {full.accuracy:.2%}"
    return [
        Panel(title, right, *labels, "{:+.2%}", neutral=0.0, line=0.0, best=place, note=note),
        Panel(
            "loss, over full depth",
            losses,
            *labels,
            "{:+.3f}",
            neutral=0.0,
            best=place,
            lower_is_better=True,
            note=f"full depth: {full.loss:.4f} nats",
        ),
    ]


def _all_logits(
    model: OpenedModel, windows_BS: np.ndarray, layers: Sequence[int], *, norm: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """Labels, full depth's logits and those of exits, some tokens at a time."""
    device, num_layers = next(model.stage.parameters()).device, model.stage.model.num_layers
    rows = max(1, _NUMBERS // (model.tokenizer.vocab_size * (len(model.exits) + 1)))
    for start in range(0, len(windows_BS), _BATCH):
        batch_BS = torch.from_numpy(windows_BS[start : start + _BATCH]).to(device)
        asked = dict(ask_all(model, batch_BS[:, :-1], rows=rows))
        for labels_N in torch.split(batch_BS[:, 1:].T.flatten(), rows):
            here = {layer: next(parts) for layer, parts in asked.items()}
            early = [here[layer].logits if norm else here[layer].output_logits for layer in layers]
            yield labels_N, here[num_layers].logits, early


@dataclass(slots=True)
class _Tally:
    """What is counted of one setting, or of full depth."""

    tokens: int = 0
    right: int = 0
    gained: int = 0
    lost: int = 0
    loss: float = 0.0

    def add(
        self,
        choosing_NV: torch.Tensor,
        logits_NV: torch.Tensor,
        labels_N: torch.Tensor,
        was_right_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens that are chosen by some logits, and whose loss is by some; returns where the choice is right [N]."""
        is_right_N = choosing_NV.argmax(-1) == labels_N
        self.tokens += len(labels_N)
        self.right += int(is_right_N.sum())
        self.loss += float(cross_entropy(logits_NV.float(), labels_N, reduction="sum"))
        if was_right_N is not None:
            self.gained += int((is_right_N & ~was_right_N).sum())
            self.lost += int((was_right_N & ~is_right_N).sum())
        return is_right_N

    def as_full(self) -> Full:
        return Full(self.tokens, self.right / self.tokens, self.loss / self.tokens)

    def as_cell(self, alpha: float, top_k: int) -> Cell:
        count, difference = self.tokens, (self.gained - self.lost) / self.tokens
        variance = (self.gained + self.lost) / count - difference**2
        return Cell(
            alpha,
            top_k,
            self.right / count,
            self.loss / count,
            self.gained,
            self.lost,
            difference,
            math.sqrt(max(variance, 0.0) / max(1, count - 1)),
        )


def _settings(base: ExitParams, alphas: Sequence[float], top_ks: Sequence[int]) -> dict[Setting, ExitParams]:
    if wrong := [alpha for alpha in alphas if not 0 < alpha < math.inf]:
        raise FieldError("--alphas", f"{wrong[0]:g} is not a number above 0, which is full depth")
    if wrong_k := [top_k for top_k in top_ks if top_k < 1]:
        raise FieldError("--top-k", f"{wrong_k[0]} is below 1")
    return {
        (alpha, top_k): base.model_copy(
            update={"mode": "sled", "sled": base.sled.model_copy(update={"alpha": alpha, "top_k": top_k})}
        )
        for alpha, top_k in product(alphas, top_ks)
    }
