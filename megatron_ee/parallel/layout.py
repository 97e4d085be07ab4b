"""Which layers and exits each pipeline stage holds.

A stage holds one chunk of the model, or several (`parallel.chunks`): then the model goes round the stages.
"""

from dataclasses import dataclass
from itertools import accumulate

from megatron_ee.config import ExitsConfig, ModelConfig, ParallelConfig, StagePlacement


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the model on one stage: layers `start + 1` to `stop`, counted from 1 over the whole model.

    Attributes:
        start, stop: number of layers run before and after this chunk.
        exits: the exits that it computes, ascending. `start` among them is an exit on the stage's input; the model's
            last layer is among the last chunk's: the final output.
    """

    start: int
    stop: int
    exits: tuple[int, ...]

    @property
    def has_embedding(self) -> bool:
        return self.start == 0


Layout = tuple[tuple[Chunk, ...], ...]
"""The chunks of every stage: `layout[stage][chunk]`."""


def place(model: ModelConfig, exits: ExitsConfig, parallel: ParallelConfig) -> Layout:
    """Each stage's layers and exits. (The config has been checked to give an exit on a border to exactly one side.)"""
    placements = _equal_layers(model, parallel) if parallel.layout == "auto" else parallel.layout
    stops = list(accumulate(part.layers for part in placements))
    chunks = []
    for placement, start, stop in zip(placements, [0, *stops], stops, strict=False):
        owned = [layer for layer in exits.layers if start < layer < stop]
        if placement.exits_at_start and start in exits.layers:
            owned.insert(0, start)
        if placement.exits_at_end and stop in exits.layers:
            owned.append(stop)
        if stop == model.num_layers:
            owned.append(stop)
        chunks.append(Chunk(start, stop, tuple(owned)))
    return tuple(tuple(chunks[stage :: parallel.pipeline]) for stage in range(parallel.pipeline))


def have_exits(layout: Layout) -> list[bool]:
    """For each chunk, in the model's order, whether it has an exit."""
    return [bool(chunk.exits) for same_chunk in zip(*layout, strict=True) for chunk in same_chunk]


def stages_with_exits(layout: Layout) -> list[int]:
    """The stages that need an output projection."""
    return [stage for stage, chunks in enumerate(layout) if any(chunk.exits for chunk in chunks)]


def _equal_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[StagePlacement, ...]:
    """As equal as can be; the first take what is left over, because the last one has the final head."""
    parts = parallel.pipeline * parallel.chunks
    layers, left_over = divmod(model.num_layers, parts)
    return tuple(StagePlacement(layers=layers + (part < left_over)) for part in range(parts))
