"""Rules of layouts: which stage has which layers, and which exit."""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ee.config.parallel import StagePlacement
    from megatron_ee.config.schema import Config


def layout_problems(config: "Config") -> Iterator[tuple[str, str]]:
    """What is wrong with `parallel.layout` for the layers that training runs."""
    parallel, layout = config.parallel, config.parallel.layout
    parts = parallel.pipeline * parallel.chunks
    if layout == "auto":
        if config.depth < parts:
            field = "chunks" if parallel.chunks > 1 else "pipeline"
            yield (
                f"parallel.{field}",
                f"{_count_parts(config)} need at least {parts} layers, not {_count_layers(config)}",
            )
        return
    if len(layout) != parts:
        yield "parallel.layout", f"needs an entry for each of {_count_parts(config)}, not {len(layout)}"
    working = [stage for stage in layout if stage.layers]
    yield from _idle_problems(config, layout, len(working))
    stops = list(accumulate(stage.layers for stage in working))
    if not stops or stops[-1] != config.depth:
        total = sum(stage.layers for stage in layout)
        yield "parallel.layout", f"its layers add up to {total}, not to {_name_depth(config)}"
    elif config.depth in config.exits.layers and not working[-1].exits_at_end:
        yield f"parallel.layout.{len(working) - 1}.exits_at_end", f"false leaves exit {config.depth} to nobody"
    yield from _border_problems(config, stops, working)


def _idle_problems(
    config: "Config", layout: "tuple[StagePlacement, ...]", num_working: int
) -> Iterator[tuple[str, str]]:
    for number, stage in enumerate(layout):
        if stage.layers:
            continue
        if config.training.trains == "all":
            yield f"parallel.layout.{number}.layers", "0 is for training.trains: exits, where stages may be left idle"
        elif number < num_working:
            yield f"parallel.layout.{number}.layers", "0 is for the last stages, and this one has layers after it"
        elif stage.exits_at_start:
            yield f"parallel.layout.{number}.exits_at_start", "true on a stage without layers, which is left idle"


def _border_problems(config: "Config", stops: list[int], working: "list[StagePlacement]") -> Iterator[tuple[str, str]]:
    for number, (border, (left, right)) in enumerate(zip(stops, pairwise(working), strict=False)):
        if border in config.exits.layers and left.exits_at_end == right.exits_at_start:
            whose = "both" if left.exits_at_end else "neither"
            yield (
                "parallel.layout",
                f"exit {border} is on the border of entries {number} and {number + 1} and is given to {whose}: set "
                f"either exits_at_end of the first or exits_at_start of the second, and not both",
            )
        elif border in config.exits.layers and right.exits_at_start and config.exits.head_of(border) == "mlp":
            yield (
                f"parallel.layout.{number + 1}.exits_at_start",
                f"exit {border} has an MLP head, which reads the inside of layer {border}: leave it to entry {number}",
            )


def _count_parts(config: "Config") -> str:
    stages, chunks = config.parallel.pipeline, config.parallel.chunks
    return f"{stages} stage{'s' * (stages > 1)}" + (f" x {chunks} chunks" if chunks > 1 else "")


def _count_layers(config: "Config") -> str:
    return f"{config.depth}" + (" up to the last exit" if config.training.trains == "exits" else "")


def _name_depth(config: "Config") -> str:
    return f"{'num_layers' if config.training.trains == 'all' else 'the last exit'} = {config.depth}"
