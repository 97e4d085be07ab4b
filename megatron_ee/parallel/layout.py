"""Which layers and exits each pipeline stage holds."""

from dataclasses import dataclass
from itertools import accumulate

from megatron_ee.config import ExitsConfig, ModelConfig, ParallelConfig, StagePlacement


@dataclass(frozen=True, slots=True)
class StageLayout:
    """The part of a model on one stage: layers `start + 1` to `stop`, counted from 1 over the whole model.

    Attributes:
        start, stop: number of layers run before and after this stage.
        exits: the exits that it computes, ascending. `start` among them is an exit on the stage's input; the model's
            last layer is among the last stage's: the final output.
    """

    start: int
    stop: int
    exits: tuple[int, ...]

    @property
    def has_embedding(self) -> bool:
        return self.start == 0


def place(model: ModelConfig, exits: ExitsConfig, parallel: ParallelConfig) -> tuple[StageLayout, ...]:
    """Each stage's layers and exits. (The config has been checked to give an exit on a border to exactly one stage.)"""
    placements = _equal_layers(model, parallel) if parallel.layout == "auto" else parallel.layout
    stops = list(accumulate(stage.layers for stage in placements))
    layouts = []
    for placement, start, stop in zip(placements, [0, *stops], stops, strict=False):
        owned = [layer for layer in exits.layers if start < layer < stop]
        if placement.exits_at_start and start in exits.layers:
            owned.insert(0, start)
        if placement.exits_at_end and stop in exits.layers:
            owned.append(stop)
        if stop == model.num_layers:
            owned.append(stop)
        layouts.append(StageLayout(start, stop, tuple(owned)))
    return tuple(layouts)


def _equal_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[StagePlacement, ...]:
    """As equal as can be; the first stages take what is left over, because the last one has the final head."""
    layers, left_over = divmod(model.num_layers, parallel.pipeline)
    return tuple(StagePlacement(layers=layers + (stage < left_over)) for stage in range(parallel.pipeline))
