"""What launches cost: layers and heads by their number of rows, in the order in which decoding reads their weights.

Each is timed where it stands between the others, so that no weight is found in a cache that decoding would have lost
it from. It is the runner's work alone, without the bookkeeping around it.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from bench_decode_ideal import LaunchCosts
from bench_decode_setup import Sizes

from megatron_ee.inference.scheduling.costs import Curve

if TYPE_CHECKING:
    from megatron_ee.inference.asked_exit import AskedExit
    from megatron_ee.inference.launch import Launch
    from megatron_ee.inference.measures import Measure
    from megatron_ee.inference.opened import OpenedModel

Part = tuple[str, int, int]
"""layers, ask, speak or store; and the layers before it and up to its end."""

_ALONE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16)
_EACH = (2, 4, 8, 16, 32)
_FEW_ROWS = 64
"""Launches of more are timed a third as often."""


def measured_costs(model: "OpenedModel", sizes: Sizes, measure: str) -> LaunchCosts:
    """For so many sequences, in the middle of their answers.

    Args:
        measure: what exits are asked for.
    """
    curves: dict[Part, list[tuple[int, float]]] = defaultdict(list)
    launches = Launches(model, sizes)
    for sequences, each in shapes_of(sizes):
        rows = sequences * each
        rounds = sizes.cost_rounds if rows <= _FEW_ROWS else max(2, sizes.cost_rounds // 3)
        for part, seconds in _costs_of(model, launches.of(sequences, each), measure, rounds).items():
            if each == 1 or part[0] in ("layers", "store"):  # an exit looks at one row a sequence
                curves[part].append((rows, seconds))

    def of(kind: str) -> dict[tuple[int, int], Curve]:
        return {(start, stop): tuple(points) for (name, start, stop), points in curves.items() if name == kind}

    asks, speaks = ({stop: curve for (_, stop), curve in of(kind).items()} for kind in ("ask", "speak"))
    return LaunchCosts(of("layers"), asks, speaks, of("store"))


def shapes_of(sizes: Sizes) -> list[tuple[int, int]]:
    """(sequences, rows of each), by ascending rows."""
    if sizes.sequences == 1:
        return [(1, rows) for rows in _ALONE if rows <= sizes.capacity]
    alone = [(count, 1) for count in _TOGETHER if count <= sizes.sequences]
    return alone + [(sizes.sequences, each) for each in _EACH if each <= sizes.capacity]


class Launches:
    """Launches of so many sequences in the middle of their answers, with keys and values that memory is read for."""

    def __init__(self, model: "OpenedModel", sizes: Sizes) -> None:
        from megatron_ee.inference.blocks import BLOCK, Blocks
        from megatron_ee.inference.kv_cache import KeyValueCache
        from megatron_ee.model.rotary import Rotary, RotationTable

        stage = model.stage
        parameter = next(stage.parameters())
        blocks = Blocks(sizes.sequences, sizes.sequences * -(-sizes.capacity // BLOCK) * BLOCK)
        for slot in range(sizes.sequences):
            blocks.reserve(slot, sizes.capacity)
        self._sizes, self._cache = sizes, KeyValueCache(stage, blocks)
        for attention in self._cache.windows:
            self._cache.of(attention).normal_()
        rotary, group = Rotary(stage.model, parameter.device), self._cache.group
        self._rotation = RotationTable(rotary, sizes.capacity, group, parameter.dtype, parameter.device)

    def of(self, sequences: int, each: int) -> "Launch":
        """Their last rows."""
        from megatron_ee.inference.launch import Launch
        from megatron_ee.inference.row_places import SequenceRows

        length = max(each, self._sizes.prompt_length + self._sizes.new_tokens // 2)
        rows = [SequenceRows(slot, range(length - each, length)) for slot in range(sequences)]
        return Launch(rows, self._cache, self._rotation)


def _costs_of(model: "OpenedModel", launch: "Launch", measure: str, rounds: int) -> dict[Part, float]:
    seconds: dict[Part, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for number in range(rounds + 1):
            for part, work in _parts(model, launch, measure):
                started = time.process_time()
                work()
                if number:
                    seconds[part].append(time.process_time() - started)
    return {part: statistics.median(values) for part, values in seconds.items()}


def _parts(model: "OpenedModel", launch: "Launch", measure: str) -> Iterator[tuple[Part, Callable[[], object]]]:
    """Segment after segment, each with its exit."""
    from megatron_ee.inference.asked_exit import AskedExit

    runner, num_layers, confidence = model.runner, model.stage.model.num_layers, model.measure_named(measure)
    x_NH = runner.embed(range(launch.num_rows))
    of_exit = x_NH[: len(launch.rows)]
    for start, stop in pairwise((0, *model.exits, num_layers)):
        yield ("layers", start, stop), partial(runner.run, x_NH, launch, start, stop)
        asked = AskedExit(runner, stop, hidden_NH=of_exit, output_NH=of_exit, previous_NH=of_exit)
        if stop < num_layers:
            yield ("ask", start, stop), partial(_confidence, confidence, asked)
        yield ("speak", start, stop), partial(_tokens, asked)
        if start:
            yield ("store", start, stop), partial(runner.store, x_NH, launch, start, stop)


def _confidence(measure: "Measure", asked: "AskedExit") -> list[float]:
    return measure(asked).tolist()


def _tokens(asked: "AskedExit") -> list[int]:
    return asked.logits.argmax(-1).tolist()
