"""Which exit should draft, and how far: speed over full depth of every pair, and of both chosen as texts go on.

The tokens are full depth's, whatever drafts; in fp32 a rounding may part two that are nearly even.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from sweep_results import Panel, Swept, as_cells
from sweep_timing import Speed, chosen_exits, fastest, heading, time_settings

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.completion import Completion, drafts_of
from megatron_ee.inference.llm import LLM

LENGTHS = (1, 2, 3, 4, 6, 8)

Auto = Literal["auto"]
Draft = tuple[int | Auto, int | Auto]
"""The exit, and the most tokens at a time."""
AUTO: Draft = ("auto", "auto")


@dataclass(frozen=True, slots=True)
class Cell:
    """One pair of exit and length.

    Attributes:
        drafted, accepted: tokens.
        acceptance: the one over the other; None: nothing was drafted.
        cycles: turns of full depth, but for a prompt's own.
        tokens_per_cycle: without each text's first, which comes of its prompt; None: there is no other.
        same_tokens: the share of full depth's tokens that stand in the same place.
        same_texts: the share of texts that are full depth's.
    """

    draft_exit: int | Auto
    draft_length: int | Auto
    speed: Speed
    drafted: int
    accepted: int
    acceptance: float | None
    cycles: int
    tokens_per_cycle: float | None
    same_tokens: float
    same_texts: float


def sweep(
    llm: LLM, prompts: Sequence[Prompt], *, exits: Sequence[int] | None, lengths: Sequence[int], rounds: int
) -> Swept:
    """
    Raises:
        FieldError: an exit or a length is none of the model's.
    """
    settings = _settings(llm, chosen_exits(llm, exits), lengths)
    timings = time_settings(llm, prompts, settings, rounds=rounds)
    cells = [_cell(draft, timings.speeds[draft], timings.texts[draft], timings.full_texts) for draft in settings]
    best = fastest(timings.speeds, timings.noise)
    lines = [
        heading(timings, prompts, llm),
        "",
        *table(cells),
        "",
        verdict(cells, best, timings.noise),
    ]
    content = {"full": {"tokens_per_second": timings.full_speed}, "noise": timings.noise, "cells": as_cells(cells)}
    chosen = ExitParams(mode="full") if best is None else settings[best]
    return Swept(lines, chosen, content, panels(cells, best))


def cycles_of(text: Completion) -> int:
    """Each turn of full depth says one token that was not drafted, but where a draft ends the text; the first is the
    prompt's."""
    return sum(not emission.drafted for emission in text.emissions) - 1 + text.emissions[-1].drafted


def same_tokens(texts: Sequence[Completion], truth: Sequence[Completion]) -> float:
    """The share of the true tokens that stand in the same place."""
    pairs = [
        pair for text, true in zip(texts, truth, strict=True) for pair in zip(text.tokens, true.tokens, strict=False)
    ]
    return sum(token == of_truth for token, of_truth in pairs) / sum(len(true.tokens) for true in truth)


def table(cells: Sequence[Cell]) -> list[str]:
    """Lines, a row for each cell."""
    lines = [f"{'exit':>5}{'drafts':>8}{'speed':>9}{'p10':>7}{'p90':>7}{'accepted':>10}{'tokens/cycle':>14}{'same':>8}"]
    for cell in cells:
        accepts = "-" if cell.acceptance is None else f"{cell.acceptance:.1%}"
        per_cycle = "-" if cell.tokens_per_cycle is None else f"{cell.tokens_per_cycle:.2f}"
        lines.append(
            f"{cell.draft_exit:>5}{cell.draft_length:>8}{cell.speed.median:>8.2f}x{cell.speed.low:>7.2f}"
            f"{cell.speed.high:>7.2f}{accepts:>10}{per_cycle:>14}{cell.same_tokens:>8.1%}"
        )
    return lines


def verdict(cells: Sequence[Cell], best: Draft | None, noise: float) -> str:
    """One sentence on what to do, and one more where tokens are not full depth's."""
    if best is None:
        highest = max(cells, key=lambda cell: cell.speed.median)
        said = (
            f"Do not switch it on: no pair is faster than full depth by more than chance ({noise:.3f}x). The highest "
            f"is {_named(highest)}, {highest.speed}."
        )
    else:
        (chosen,) = (cell for cell in cells if (cell.draft_exit, cell.draft_length) == best)
        said = f"Best: {_named(chosen)}: {chosen.speed} as fast as full depth."
    least = min(cells, key=lambda cell: cell.same_tokens)
    if least.same_tokens < 1:
        said += (
            f"\nNot all tokens are full depth's: {least.same_tokens:.1%} are with {_named(least)}. Where two tokens "
            f"are nearly even, rounding decides, and all that follows is another text."
        )
    return said


def panels(cells: Sequence[Cell], best: Draft | None) -> list[Panel]:
    """Speed and acceptance by exit and length; what was chosen as texts went on is a note."""
    of: dict[Draft, Cell] = {(cell.draft_exit, cell.draft_length): cell for cell in cells}
    exits, lengths = (list(dict.fromkeys(draft[axis] for draft in of if draft != AUTO)) for axis in (0, 1))
    place = None if best in (None, AUTO) else (exits.index(best[0]), lengths.index(best[1]))
    labels = ([str(layer) for layer in exits], [str(length) for length in lengths], "exit", "tokens drafted at a time")
    speeds = [[of[layer, length].speed.median for length in lengths] for layer in exits]
    accepted = [[of[layer, length].acceptance for length in lengths] for layer in exits]
    note = f"auto: {of[AUTO].speed}" + (", the best" if best == AUTO else "")
    return [
        Panel("speed over full depth", speeds, *labels, "{:.2f}x", neutral=1.0, line=1.0, best=place, note=note),
        Panel("drafted tokens accepted", accepted, *labels, "{:.0%}", best=place),
    ]


def _settings(llm: LLM, exits: Sequence[int], lengths: Sequence[int]) -> dict[Draft, ExitParams]:
    base = llm.config.inference.exit
    if wrong := [length for length in lengths if not 1 <= length <= base.max_pending]:
        raise FieldError("--lengths", f"{wrong[0]} is not in 1 to {base.max_pending} (inference.exit.max_pending)")
    drafts: list[Draft] = [*product(exits, lengths), AUTO]
    common = {"mode": "speculative", "exits": tuple(exits), "min_exit": 0}
    return {
        draft: base.model_copy(update={**common, "draft_exit": draft[0], "draft_length": draft[1]}) for draft in drafts
    }


def _cell(draft: Draft, speed: Speed, texts: Sequence[Completion], truth: Sequence[Completion]) -> Cell:
    drafts = drafts_of(emission for text in texts for emission in text.emissions)
    cycles, later = sum(map(cycles_of, texts)), sum(len(text.emissions) - 1 for text in texts)
    same_texts = sum(text.tokens == true.tokens for text, true in zip(texts, truth, strict=True)) / len(truth)
    return Cell(
        *draft,
        speed=speed,
        drafted=drafts.drafted,
        accepted=drafts.accepted,
        acceptance=drafts.acceptance,
        cycles=cycles,
        tokens_per_cycle=later / cycles if cycles else None,
        same_tokens=same_tokens(texts, truth),
        same_texts=same_texts,
    )


def _named(cell: Cell) -> str:
    if cell.draft_exit == "auto":
        return "exit and length auto"
    return f"exit {cell.draft_exit} with drafts of {cell.draft_length}"
