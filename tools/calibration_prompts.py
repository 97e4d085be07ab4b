"""The prompts of a calibration: where they come from, and which of them do what."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ee.errors import UserError
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.prompts import read_prompts

CHOOSING, FRESH = 0.2, 0.2
"""Shares of the prompts: that choose the candidates, and that nothing is chosen by. All others test candidates."""
FEWEST = 20  # prompts


@dataclass(frozen=True)
class Asked:
    """
    Attributes:
        references: the right answer to each prompt; empty: nobody knows.
    """

    prompts: Sequence[Prompt]
    references: Sequence[str] = ()

    def of(self, numbers: Sequence[int]) -> "Asked":
        """Some of them."""
        return Asked([self.prompts[at] for at in numbers], [self.references[at] for at in numbers if self.references])


class Parts(NamedTuple):
    """No prompt is in two of them."""

    choosing: Asked
    calibration: Asked
    fresh: Asked


def split(asked: Asked, seed: int, count: int) -> Parts:
    """At most so many of the prompts, in an order that is drawn.

    Raises:
        UserError: there are too few for three parts.
    """
    order = np.random.default_rng(seed).permutation(len(asked.prompts))[:count].tolist()
    if len(order) < FEWEST:
        raise UserError(f"{len(order)} prompts, and {FEWEST} are needed: some choose, some test, and some are kept")
    first, last = round(CHOOSING * len(order)), round((1 - FRESH) * len(order))
    return Parts(asked.of(order[:first]), asked.of(order[first:last]), asked.of(order[last:]))


def windows_of(tokens: np.ndarray, length: int) -> Asked:
    """A text as prompts of so many tokens, none over another.

    Raises:
        UserError: it is shorter than one.
    """
    count = len(tokens) // length
    if count < 1:
        raise UserError(f"{len(tokens)} tokens of text make no prompt of {length}")
    return Asked(tokens[: count * length].reshape(count, length).tolist())


def read_asked(path: Path, *, with_references: bool) -> Asked:
    """
    Raises:
        UserError: see `read_prompts`; or references are wanted, and a prompt has none.
    """
    prompts = read_prompts(path)
    if not with_references:
        return Asked(prompts)
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: references are wanted: a .jsonl of objects with `prompt` and `reference`")
    lines = [
        (number, json.loads(line))
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
        if line.strip()
    ]
    for number, line in lines:
        if not isinstance(line.get("reference"), str):
            raise UserError(f"{path}:{number}: no text `reference`, which the risk is measured against")
    return Asked(prompts, [line["reference"] for _, line in lines])
