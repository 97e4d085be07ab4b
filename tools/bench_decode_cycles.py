"""What the launches of self-speculation cost, each timed where it stands in a cycle: which weights are in a cache
depends on what ran before. It is the runner's work alone, without the bookkeeping around it.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from bench_decode_costs import Launches
from bench_decode_law import CycleCosts, SpeculationCosts
from bench_decode_setup import Sizes

if TYPE_CHECKING:
    from megatron_ee.inference.launch import Launch
    from megatron_ee.inference.opened import OpenedModel

_TOGETHER = (1, 2, 4, 8, 16)
_Part = tuple[str, int]
"""What it is, and its rows."""
_Work = Callable[[], object]
_Shape = tuple[int, int, int]
"""The exit, the tokens of a draft, of which 0 is full depth, and the sequences."""


class CycleTimer:
    """Times cycles of so many sequences, in the middle of their answers, whenever it is called: in turns with what they
    are held against, so that a machine that is busy for a while is so for both.

    Args:
        lengths: tokens of a draft.
    """

    def __init__(self, model: "OpenedModel", sizes: Sizes, exits: Sequence[int], lengths: Sequence[int]) -> None:
        self._exits, self._lengths = exits, lengths
        self._counts = [count for count in _TOGETHER if count <= sizes.sequences]
        launches = Launches(model, sizes)
        self._cycles = {shape: _cycle(model, launches, *shape) for shape in product(exits, lengths, self._counts)}
        self._prompts = _prompts(model, launches.of(sizes.sequences, sizes.prompt_length))
        self._seconds: dict[_Shape, dict[_Part, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._seconds_of_prompts: list[float] = []

    @torch.inference_mode()
    def __call__(self, number: int) -> float:
        """Each twice, of which the second counts; of the first round none."""
        started = time.process_time()
        for shape, parts in self._cycles.items():
            _once(parts)
            for part, seconds in _once(parts).items() if number else ():
                self._seconds[shape][part].append(seconds)
        if number:
            self._seconds_of_prompts.append(sum(_once(self._prompts).values()))
        return time.process_time() - started

    @property
    def costs(self) -> SpeculationCosts:
        """The medians."""
        cycles = {layer: {length: self._cycle(layer, length) for length in self._lengths} for layer in self._exits}
        return SpeculationCosts(statistics.median(self._seconds_of_prompts), cycles)

    def _cycle(self, layer: int, length: int) -> CycleCosts:
        curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for count in self._counts:
            for (name, rows), seconds in self._seconds[layer, length, count].items():
                curves[name].append((rows, statistics.median(seconds)))
        nothing = [(1, 0.0)]
        return CycleCosts(*(tuple(curves.get(name, nothing)) for name in ("shallow", "head", "deep", "final")))


def _cycle(
    model: "OpenedModel", launches: Launches, layer: int, length: int, sequences: int
) -> list[tuple[_Part, _Work]]:
    runner, num_layers, verified = model.runner, model.stage.model.num_layers, sequences * (length + 1)
    one, all_of_it = launches.of(sequences, 1), launches.of(sequences, length + 1)
    x_NH, x_RH = runner.embed(range(sequences)), runner.embed(range(verified))
    shallow = ("shallow", sequences), partial(runner.run, x_NH, one, 0, layer)
    head = ("head", sequences), partial(_tokens, model, x_NH, layer)
    deep = ("deep", verified), partial(runner.run, x_RH, all_of_it, layer, num_layers)
    return [*(shallow, head) * length, shallow, deep, (("final", verified), partial(_tokens, model, x_RH, num_layers))]


def _prompts(model: "OpenedModel", launch: "Launch") -> list[tuple[_Part, _Work]]:
    runner, num_layers, count = model.runner, model.stage.model.num_layers, len(launch.rows)
    x_NH = runner.embed(range(launch.num_rows))
    layers = ("layers", launch.num_rows), partial(runner.run, x_NH, launch, 0, num_layers)
    return [layers, (("head", count), partial(_tokens, model, x_NH[:count], num_layers))]


def _once(parts: Sequence[tuple[_Part, _Work]]) -> dict[_Part, float]:
    """CPU seconds of each part, its mean over its places in a cycle."""
    seconds: dict[_Part, list[float]] = defaultdict(list)
    for part, work in parts:
        started = time.process_time()
        work()
        seconds[part].append(time.process_time() - started)
    return {part: statistics.mean(places) for part, places in seconds.items()}


def _tokens(model: "OpenedModel", hidden_NH: torch.Tensor, layer: int) -> list[int]:
    from megatron_ee.inference.asked_exit import AskedExit
    from megatron_ee.inference.sampling.draw import likeliest

    asked = AskedExit(model.runner, layer, hidden_NH=hidden_NH, output_NH=hidden_NH, previous_NH=hidden_NH)
    return likeliest(asked.logits).tolist()
