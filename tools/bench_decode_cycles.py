"""What the launches of self-speculation cost, each timed where it stands in a cycle: which weights are in a cache
depends on what ran before. It is the runner's work alone, without the bookkeeping around it.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from bench_decode_costs import launch_of
from bench_decode_law import CycleCosts, SpeculationCosts
from bench_decode_setup import Sizes

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel

_TOGETHER = (1, 2, 4, 8, 16)
_Part = tuple[str, int]
"""What it is, and its rows."""
_Work = Callable[[], object]


def measured_cycles(
    model: "OpenedModel", sizes: Sizes, exits: Iterable[int], lengths: Iterable[int]
) -> SpeculationCosts:
    """For so many sequences, in the middle of their answers.

    Args:
        lengths: tokens of a draft; 0 is full depth.
    """
    with torch.inference_mode():
        cycles = {layer: {length: _cycle_costs(model, sizes, layer, length) for length in lengths} for layer in exits}
        return SpeculationCosts(_prompts(model, sizes), cycles)


def _cycle_costs(model: "OpenedModel", sizes: Sizes, layer: int, length: int) -> CycleCosts:
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for sequences in (count for count in _TOGETHER if count <= sizes.sequences):
        parts = _cycle(model, sizes, layer, length, sequences)
        for (name, rows), seconds in _medians(parts, sizes.cost_rounds).items():
            curves[name].append((rows, seconds))
    nothing = [(1, 0.0)]
    return CycleCosts(*(tuple(curves.get(name, nothing)) for name in ("shallow", "head", "deep", "final")))


def _cycle(model: "OpenedModel", sizes: Sizes, layer: int, length: int, sequences: int) -> list[tuple[_Part, _Work]]:
    runner, num_layers, verified = model.runner, model.stage.model.num_layers, sequences * (length + 1)
    one, all_of_it = launch_of(model, sizes, (sequences, 1)), launch_of(model, sizes, (sequences, length + 1))
    x_NH, x_RH = runner.embed(range(sequences)), runner.embed(range(verified))
    shallow = ("shallow", sequences), partial(runner.run, x_NH, one, 0, layer)
    head = ("head", sequences), partial(_tokens, model, x_NH, layer)
    deep = ("deep", verified), partial(runner.run, x_RH, all_of_it, layer, num_layers)
    return [*(shallow, head) * length, shallow, deep, (("final", verified), partial(_tokens, model, x_RH, num_layers))]


def _prompts(model: "OpenedModel", sizes: Sizes) -> float:
    runner, num_layers = model.runner, model.stage.model.num_layers
    launch = launch_of(model, sizes, (sizes.sequences, sizes.prompt_length))
    x_NH = runner.embed(range(launch.num_rows))
    layers = ("layers", launch.num_rows), partial(runner.run, x_NH, launch, 0, num_layers)
    head = ("head", sizes.sequences), partial(_tokens, model, x_NH[: sizes.sequences], num_layers)
    return sum(_medians([layers, head], sizes.cost_rounds).values())


def _medians(parts: Sequence[tuple[_Part, _Work]], rounds: int) -> dict[_Part, float]:
    """CPU seconds of each part, its mean over a round; the first round is dropped."""
    seconds: dict[_Part, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        of_round: dict[_Part, list[float]] = defaultdict(list)
        for part, work in parts:
            started = time.process_time()
            work()
            of_round[part].append(time.process_time() - started)
        for part, places in of_round.items() if number else ():
            seconds[part].append(statistics.mean(places))
    return {part: statistics.median(of) for part, of in seconds.items()}


def _tokens(model: "OpenedModel", hidden_NH: torch.Tensor, layer: int) -> list[int]:
    from megatron_ee.inference.asked_exit import AskedExit
    from megatron_ee.inference.sampling.draw import likeliest

    asked = AskedExit(model.runner, layer, hidden_NH=hidden_NH, output_NH=hidden_NH, previous_NH=hidden_NH)
    return likeliest(asked.logits).tolist()
