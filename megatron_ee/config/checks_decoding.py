"""Rules of decoding through a pipeline: which stage has which layers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ee.config.inference import DecodingParallelConfig


def stage_problems(parallel: "DecodingParallelConfig", num_layers: int) -> Iterator[tuple[str, str]]:
    """What is wrong with `inference.parallel` for a model of so many layers."""
    layout, stages = parallel.layout, parallel.pipeline
    if stages > num_layers:
        yield "inference.parallel.pipeline", f"{stages} stages need at least {stages} layers, not {num_layers}"
    if isinstance(layout, tuple):
        if len(layout) != stages:
            whose = f"each of {stages} stages" if stages > 1 else "the one stage"
            yield "inference.parallel.layout", f"needs a number of layers for {whose}, not {len(layout)} of them"
        if sum(layout) != num_layers:
            yield "inference.parallel.layout", f"its layers add up to {sum(layout)}, not to num_layers = {num_layers}"
    if layout == "survival" and parallel.depths is None:
        yield (
            "inference.parallel.depths",
            "null, but layout survival needs a file that python -m megatron_ee.inference --depths wrote",
        )
    if layout != "survival" and parallel.depths is not None:
        chosen = layout if isinstance(layout, str) else list(layout)
        yield "inference.parallel.depths", f"{parallel.depths!r} is for layout survival, not {chosen}"
