"""The parts of the model that pipeline stages hold.

A stage holds one chunk of the model, or several (`parallel.chunks`): then the model goes round the stages.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the model on one stage: layers `start + 1` to `stop`, counted from 1 over the whole model.

    Attributes:
        start, stop: number of layers run before and after this chunk; equal on a stage that is left idle.
        exits: the exits that it computes, ascending. `start` among them is an exit on the stage's input; the model's
            last layer is among the last chunk's: the final output.
    """

    start: int
    stop: int
    exits: tuple[int, ...]

    @property
    def has_embedding(self) -> bool:
        return self.start == 0

    @property
    def is_empty(self) -> bool:
        """Whether its stage is left idle."""
        return self.start == self.stop


Layout = tuple[tuple[Chunk, ...], ...]
"""The chunks of every stage: `layout[stage][chunk]`."""


def count_idle(layout: Layout) -> int:
    """The last stages, which have nothing to do where only the model's first layers run."""
    return sum(all(chunk.is_empty for chunk in chunks) for chunks in layout)


def have_exits(layout: Layout) -> list[bool]:
    """For each chunk of the stages that have something to do, in the model's order, whether it has an exit."""
    working = layout[: len(layout) - count_idle(layout)]
    return [bool(chunk.exits) for same_chunk in zip(*working, strict=True) for chunk in same_chunk]
