"""From prompts to promises: candidates, their losses, and which of them may be deployed."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calibration_path import Candidate, Way, candidates
from calibration_prompts import Parts
from calibration_results import Promise, Terms, choose
from calibration_runs import Measured, Trial
from serving_recommend import hear
from tqdm import tqdm

from megatron_ee.errors import UserError
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.llm import LLM

_BEYOND = 2.0
"""The curve goes on to this multiple of the highest target, beyond which nobody deploys."""


@dataclass(frozen=True)
class Calibrated:
    """
    Attributes:
        measured: candidates on the prompts that test them, full depth first.
        full_fresh: full depth on the fresh prompts.
        promises: one for each target, ascending.
    """

    measured: Sequence[Measured]
    full_fresh: Measured
    promises: Sequence[Promise]

    @property
    def full(self) -> Measured:
        return self.measured[0]


def calibrate(llm: LLM, parts: Parts, terms: Terms, targets: Sequence[float], way: Way) -> Calibrated:
    """
    Args:
        targets: ascending.

    Raises:
        UserError: the model has no exit that may fire, or a prompt doesn't fit it.
    """
    base = llm.config.inference.exit
    open_to_all = base.model_copy(update={"mode": "early_exit", "threshold": 0.5, "thresholds": {}})
    exits = list(ExitRule(open_to_all, llm.model.exits, llm.model.gated).thresholds)
    if not exits:
        raise UserError("no exit may fire: the model has none, or inference.exit leaves none over")
    bar: tqdm[Any] = tqdm(unit=" candidates", disable=None if llm.is_first else True)
    with bar:
        bar.set_description("choosing candidates")
        tried = candidates(hear(llm, parts.choosing.prompts), base, exits, way)
        bar.reset(total=len(tried))
        trial = Trial(llm, parts.calibration, terms.risk)
        measured = list(_measured(trial, tried, _BEYOND * targets[-1], bar, says=llm.is_first))
        promises = [choose(measured, target, terms) for target in targets]
        bar.set_description("fresh prompts")
        fresh = Trial(llm, parts.fresh, terms.risk)
        full_fresh = fresh.measure(tried[0])
        return Calibrated(measured, full_fresh, list(_with_fresh(promises, fresh, full_fresh)))


def _with_fresh(promises: Sequence[Promise], trial: Trial, full: Measured) -> Iterator[Promise]:
    """Each chosen candidate is decoded once."""
    known = {full.candidate.name: full}
    for promise in promises:
        if promise.chosen is None:
            yield promise
            continue
        candidate = promise.chosen.candidate
        if candidate.name not in known:
            known[candidate.name] = trial.measure(candidate)
        yield replace(promise, fresh=known[candidate.name])


def _measured(
    trial: Trial, tried: Sequence[Candidate], most: float, bar: "tqdm[Any]", *, says: bool
) -> Iterator[Measured]:
    """One after another, until the losses are above all that may be deployed; where that is depends on the losses
    alone, which changes nothing of what the tests before it have shown."""
    for candidate in tried:
        bar.set_description(candidate.name)
        measured = trial.measure(candidate)
        bar.update()
        if bar.disable and says:  # in a log, a line for each
            print(f"{candidate.name}: risk {measured.risk:.2%}, {measured.seconds:.0f} s", file=sys.stderr, flush=True)
        yield measured
        if measured.risk > most:
            return
