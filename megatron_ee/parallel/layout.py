"""Which layers and exits each pipeline stage gets: pinned by hand, or balanced by what they cost."""

from itertools import accumulate

from megatron_ee.config import Config, ExitsConfig, ModelConfig, ParallelConfig, StagePlacement
from megatron_ee.parallel.balance import Work, balance
from megatron_ee.parallel.chunks import Chunk, Layout
from megatron_ee.parallel.costs import ModelCosts, chunk_costs, costs_of


def layout_of(config: Config, vocab_size: int) -> Layout:
    """Each stage's layers and exits, by the durations that the config chooses.

    Raises:
        FieldError: see `read_costs`.
    """
    return place(config.model, config.exits, config.parallel, costs_of(config, vocab_size), depth=config.depth)


def place(
    model: ModelConfig,
    exits: ExitsConfig,
    parallel: ParallelConfig,
    costs: ModelCosts | None = None,
    *,
    depth: int | None = None,
) -> Layout:
    """Each stage's layers and exits. (The config has been checked to give an exit on a border to exactly one side.)

    Args:
        costs: what `parallel.layout: auto` balances; not needed where the model stays whole or the layout is pinned.
        depth: place the layers up to this one only, which is that of an exit; None: the whole model.
    """
    depth = depth or model.num_layers
    placements = _placements(depth, exits, parallel, costs)
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
        chunks.append(Chunk(start, stop, tuple(owned) if placement.layers else ()))
    return tuple(tuple(chunks[stage :: parallel.pipeline]) for stage in range(parallel.pipeline))


def describe_layout(layout: Layout, exits: ExitsConfig, costs: ModelCosts) -> list[str]:
    """A line for each stage: its layers, its exits, and its share of the work."""
    totals = chunk_costs(layout, exits, costs).totals
    lines = []
    for stage, (chunks, total) in enumerate(zip(layout, totals, strict=True)):
        if all(chunk.is_empty for chunk in chunks):
            lines.append(f"stage {stage}: idle")
            continue
        names = [str(layer) if layer in exits.layers else "final" for chunk in chunks for layer in chunk.exits]
        layers = " ".join(map(_layers, chunks))
        own_exits = " ".join(["exits", *names]) if names else "no exits"
        of_slowest, of_all = total / max(totals), total / sum(totals)
        lines.append(
            f"stage {stage}: layers {layers}, {own_exits}, "
            f"{of_slowest:.1%} of the slowest stage's work, {of_all:.1%} of all"
        )
    return lines


def _layers(chunk: Chunk) -> str:
    first = chunk.start + 1
    return str(first) if first == chunk.stop else f"{first}-{chunk.stop}"


def _placements(
    depth: int, exits: ExitsConfig, parallel: ParallelConfig, costs: ModelCosts | None
) -> tuple[StagePlacement, ...]:
    if parallel.layout != "auto":
        return parallel.layout
    if parallel.pipeline * parallel.chunks == 1:
        return (StagePlacement(layers=depth),)
    assert costs is not None, "an automatic layout of several parts needs costs"
    work = Work(
        layers=(costs.layer,) * depth,
        first=costs.embedding,
        last=0.0 if depth in exits.layers else costs.exits[exits.head_of(depth)],
        exits={layer: costs.exits[exits.head_of(layer)] for layer in exits.layers},
        only_at_end=frozenset(layer for layer in exits.layers if exits.head_of(layer) == "mlp"),
    )
    return balance(work, parallel.pipeline, parallel.chunks)
