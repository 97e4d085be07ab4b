"""Decoding a token through CUDA graphs: a segment's dozens of kernels a layer are started at once.

A graph repeats kernels on the very tensors that it was recorded with, so inputs are copied to where it reads them, and
sizes are rounded up to a few buckets: rows to a power of two, positions attended to likewise. A row that is padding
writes its keys and values to a place that nobody reads.

Shapes: N rows, P slots, B blocks of a sequence, H hidden size.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.launch import Launch
from megatron_ee.inference.row_places import SequenceRows
from megatron_ee.inference.runner import Runner
from megatron_ee.inference.static_rows import Extent, StaticRows
from megatron_ee.model.rotary import RotationTable

Computation = Callable[[], Sequence[torch.Tensor]]
Capture = Callable[[Computation], Computation]
"""Records what a function computes, on the tensors that it does so with. What comes back does it again, and its results
are always the same tensors."""

SHORTEST = 64
"""Positions of the smallest bucket."""

PLAIN_LAUNCHES = 8
"""So many of a bucket come before it is recorded: that takes as long as dozens of them, and some never come again."""

MOST_GRAPHS = 256
"""A graph of a deep segment takes megabytes."""


def capture_on(device: torch.device, tensor_group: dist.ProcessGroup) -> Capture | None:
    """How work is recorded on this device; None: not at all, as on a CPU, and where ranks wait for each other."""
    if device.type != "cuda" or tensor_group.size() > 1:
        return None
    return CudaCapture()


class CudaCapture:
    """Graphs that share their memory, since they run one after another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Computation) -> Computation:
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(here)
        with torch.cuda.stream(beside):  # libraries set themselves up at a first call, which cannot be recorded
            work()
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = work()

        def again() -> Sequence[torch.Tensor]:
            graph.replay()
            return results

        return again


class SegmentGraphs:
    """Runs segments as `Runner.run` does; where a launch has one row of each of its sequences, and has come often
    enough, by a graph.

    Args:
        capacity: positions of a sequence at most.
    """

    def __init__(
        self, runner: Runner, cache: KeyValueCache, rotation: RotationTable, capture: Capture, *, capacity: int
    ) -> None:
        self._runner, self._cache, self._rotation, self._capture = runner, cache, rotation, capture
        self._capacity, slots = capacity, cache.blocks.slots
        parameter = next(runner.stage.parameters())
        self._x_PH = parameter.new_zeros(slots, runner.stage.model.hidden_size)
        self._places_2P = torch.zeros(2, slots, dtype=torch.int64, device=parameter.device)
        self._blocks_PB = torch.zeros_like(cache.blocks_of(range(slots), capacity), device=parameter.device)
        self._counts: Counter[_Bucket] = Counter()
        self._graphs: dict[_Bucket, _Graph] = {}

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(
        self, x_NH: torch.Tensor, launch: Launch, start: int, stop: int
    ) -> tuple[torch.Tensor, Mapping[int, torch.Tensor]]:
        """See `Runner.run`."""
        if launch.num_rows > len(launch.rows):
            return self._runner.run(x_NH, launch, start, stop)
        bucket = _Bucket(start, stop, self._extent(launch.rows))
        if bucket not in self._graphs and (self._counts[bucket] < PLAIN_LAUNCHES or self.num_graphs == MOST_GRAPHS):
            self._counts[bucket] += 1
            return self._runner.run(x_NH, launch, start, stop)
        self._enter(x_NH, launch.rows, bucket.extent)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._record(bucket)
        graph = self._graphs[bucket]
        results = graph.again()
        own = {id(result): result[: len(x_NH)].clone() for result in results}  # the next launch overwrites results
        y_NH, *taps = (own[id(result)] for result in results)
        return y_NH, dict(zip(graph.taps, taps, strict=True))

    def _extent(self, rows: Sequence[SequenceRows]) -> Extent:
        longest = max(positions.stop for _, positions in rows)
        length = min(max(SHORTEST, _power_of_two(longest)), self._capacity)
        blocks = self._cache.blocks
        begins = all(blocks.start(slot) == number * blocks.spacing for number, (slot, _) in enumerate(rows))
        return Extent(
            rows=min(_power_of_two(len(rows)), blocks.slots),
            length=length,
            are_spaced=begins and all(blocks.reaches(slot, length) for slot, _ in rows),
        )

    def _enter(self, x_NH: torch.Tensor, rows: Sequence[SequenceRows], extent: Extent) -> None:
        """Copy inputs to where graphs read them. Padding is the first row again, and its results go nowhere."""
        padding = [rows[0]] * (extent.rows - len(rows))
        slots = [slot for slot, _ in (*rows, *padding)]
        positions = [of.start for _, of in (*rows, *padding)]
        written = [place for slot, of in rows for place in self._cache.blocks.places(slot, of)]
        written += [self._cache.nowhere] * len(padding)
        self._places_2P[:, : extent.rows].copy_(torch.tensor([positions, written]))
        if not extent.are_spaced:
            blocks_NB = self._cache.blocks_of(slots, extent.length)
            self._blocks_PB[: extent.rows, : blocks_NB.shape[1]].copy_(blocks_NB)
        self._x_PH[: len(rows)].copy_(x_NH)

    def _record(self, bucket: "_Bucket") -> "_Graph":
        size, taps = bucket.extent.rows, dict[int, torch.Tensor]()
        num_blocks = -(-bucket.extent.length // self._cache.blocks.size)
        rows = StaticRows(
            bucket.extent,
            self._places_2P[:, :size],
            self._blocks_PB[:size, :num_blocks],
            self._cache,
            self._rotation,
        )

        def work() -> Sequence[torch.Tensor]:
            rows.begin()
            y_NH, tapped = self._runner.run(self._x_PH[:size], rows, bucket.start, bucket.stop)
            taps.update(tapped)
            return [y_NH, *tapped.values()]

        return _Graph(self._capture(work), list(taps))


class _Bucket(NamedTuple):
    """Launches that one graph serves."""

    start: int
    stop: int
    extent: Extent


class _Graph(NamedTuple):
    """
    Attributes:
        again: its results are the segment's output, and then what exits read.
        taps: the layers of these exits.
    """

    again: Computation
    taps: Sequence[int]


def _power_of_two(number: int) -> int:
    """The smallest one that is not below."""
    return 1 << (number - 1).bit_length()
