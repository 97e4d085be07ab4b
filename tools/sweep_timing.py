"""How fast settings decode, over full depth, and which of them is the fastest that noise does not explain.

A few settings at a time take turns with full depth, which begins and ends each round: what slows the machine for a
while hits both sides of a ratio.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Generic, NamedTuple, TypeVar

from bench_report import all_take_turns
from tqdm import tqdm

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.comparison import greedy
from megatron_ee.inference.completion import Completion
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.llm import LLM

TOGETHER = 3  # settings between two turns of full depth
CHANCE = 0.05  # of a sweep that finds something where there is nothing

Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second over full depth's: the median of the rounds, and their 10th and 90th percentile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


class Timings(NamedTuple, Generic[Name]):
    """Of all settings, by name.

    Attributes:
        full_texts: of full depth, in the prompts' order.
        full_speed: of full depth, in tokens per second; the median.
        texts: of each setting.
        speeds: of each setting.
        same: full depth over itself, in pairs.
        noise: see `noise_of`.
    """

    full_texts: list[Completion]
    full_speed: float
    texts: dict[Name, list[Completion]]
    speeds: dict[Name, Speed]
    same: Speed
    noise: float


def time_settings(
    llm: LLM, prompts: Sequence[Prompt], settings: Mapping[Name, ExitParams], *, rounds: int
) -> Timings[Name]:
    """Decode the prompts greedily, with each setting in each round; one round more comes first and does not count.

    Raises:
        UserError: a prompt or a setting does not fit the model; nothing has been timed.
    """
    for params in settings.values():
        rule = ExitRule(params, llm.model.exits, llm.model.gated)
        llm.model.measure_named(rule.measure)
    names = list(settings)
    turns = -(-len(names) // TOGETHER) * 2 + len(names)
    speeds: dict[Name, Speed] = {}
    same: list[float] = []
    seconds: list[float] = []
    with progress(turns * (rounds + 1), "decoding") as done:
        full = _Decoding(llm, prompts, ExitParams(mode="full"), done)
        decodings = {name: _Decoding(llm, prompts, params, done) for name, params in settings.items()}
        for start in range(0, len(names), TOGETHER):
            group = names[start : start + TOGETHER]
            timed = all_take_turns(rounds + 1, full, [decodings[name] for name in group])
            for name, of in zip(group, timed, strict=True):
                speeds[name] = speed_of([1 / ratio for ratio in of.paired])
            same += [again / a for a, again in zip(timed[0].a, timed[0].again, strict=True)]
            seconds += timed[0].a
    noise = noise_of(same, rounds=rounds, settings=len(settings))
    texts = {name: decoding.texts for name, decoding in decodings.items()}
    return Timings(full.texts, 1 / statistics.median(seconds), texts, speeds, speed_of(same), noise)


def heading(timings: Timings[Name], prompts: Sequence[Prompt], llm: LLM) -> str:
    """What the table is of, and how much of it is noise."""
    together = min(len(prompts), llm.config.inference.max_batch_size)
    return (
        f"{len(prompts)} prompts, {together} at a time; full depth: {timings.full_speed:.1f} tokens/s, over itself "
        f"{timings.same}\nspeed: over full depth. Up to {timings.noise:.3f}x is chance, of the fastest of "
        f"{len(timings.speeds)} settings."
    )


def chosen_exits(llm: LLM, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Those that are asked for, or else all that the config lets a token leave at.

    Raises:
        FieldError: the model lacks one, or there is none.
    """
    exits, base = llm.model.exits, llm.config.inference.exit
    if asked is None:
        asked = base.model_copy(update={"mode": "speculative", "draft_exit": "auto"}).may_draft(exits)
    if unknown := [layer for layer in asked if layer not in exits]:
        raise FieldError("--exits", f"there is no exit after layer {unknown[0]}, only after {list(exits)}")
    if not asked:
        raise FieldError("inference.exit", f"leaves none of the exits after {list(exits)}: say which, --exits")
    return tuple(sorted(set(asked)))


def speed_of(ratios: Sequence[float]) -> Speed:
    """Of rounds, each over full depth."""
    low, high = _tenths(ratios)
    return Speed(statistics.median(ratios), low, high)


def noise_of(ratios: Sequence[float], *, rounds: int, settings: int) -> float:
    """How fast chance makes the fastest of settings that are all as fast as full depth: in one sweep of twenty it is
    more; 1 without noise.

    A ratio's logarithm is taken for normal but for its tails, and a median over rounds varies by
    sqrt(pi / 2 / rounds) of what a ratio does.

    Args:
        ratios: of full depth over itself, in pairs.
    """
    deviation = _tenths([abs(math.log(ratio)) for ratio in ratios])[1] / NormalDist().inv_cdf(0.95)
    return math.exp(deviations_needed(settings) * deviation * math.sqrt(math.pi / 2 / rounds))


def deviations_needed(settings: int) -> float:
    """So many standard deviations the best of settings reaches by chance in one sweep of twenty (Bonferroni)."""
    return NormalDist().inv_cdf(1 - CHANCE / settings)


def fastest(speeds: Mapping[Name, Speed], noise: float) -> Name | None:
    """The setting with the highest speed, if that is above the noise; the first one of equals."""
    above = [name for name, speed in speeds.items() if speed.median > noise]
    return max(above, key=lambda name: speeds[name].median, default=None)


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[..., object]]:
    """A bar on a terminal; call what it yields at each step, or after so many."""
    with tqdm(desc=what, total=total, disable=None, leave=False) as bar:
        yield bar.update


class _Decoding:
    """Decodes the prompts with one setting. `texts` are those of the last call."""

    def __init__(self, llm: LLM, prompts: Sequence[Prompt], params: ExitParams, done: Callable[[], object]) -> None:
        self._llm, self._prompts, self._params, self._done = llm, list(prompts), params, done
        self._clock = _clock_of(llm)
        self.texts: list[Completion] = []

    def __call__(self, _number: int) -> float:
        """Seconds per token."""
        sampling = greedy(self._llm.config.inference.sampling)
        started = self._clock()
        self.texts = self._llm.generate(self._prompts, sampling, self._params)
        seconds = self._clock() - started
        self._done()
        return seconds / sum(len(text.emissions) for text in self.texts)


def _clock_of(llm: LLM) -> Callable[[], float]:
    """On one core the time of the processor, to which other programs add little; or else that of the clock."""
    import torch

    is_one_core = next(llm.model.stage.parameters()).device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if is_one_core else time.perf_counter


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]
