"""Rules between exits and the rest of a config: each is a generator of (path, message) pairs."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ee.config.inference import ExitParams
    from megatron_ee.config.model import ExitsConfig
    from megatron_ee.config.schema import Config

Problems = Iterator[tuple[str, str]]


def exit_problems(config: "Config") -> Problems:
    """All that is wrong with exits in a config whose fields are right by themselves."""
    yield from _layer_problems(config)
    yield from _pinned_problems(config)
    yield from _measure_problems(config)


def learners_from_final(exits: "ExitsConfig") -> dict[str, list[int]]:
    """field -> the exits that it has learn from the final one, which has to be in the same part of the model."""
    learners = {"exits.distillation": list(exits.layers) if exits.distillation is not None else []}
    if exits.gate_loss.target == "final":
        learners["exits.gate_loss.target"] = exits.gated
    return learners


def apart_from_final(layer: int, own: tuple[int, int], final: tuple[int, int], *, num_chunks: int) -> str:
    """What is wrong with an exit that learns from the final one in another part; parts are (stage, chunk)."""
    (stage, chunk), (final_stage, final_chunk) = own, final
    of_own, of_final = (f", chunk {chunk}", f", chunk {final_chunk}") if num_chunks > 1 else ("", "")
    return (
        f"needs the final exit beside the one that learns from it, but exit {layer} is on stage {stage}{of_own} and "
        f"the final exit on stage {final_stage}{of_final}"
    )


def unknown_exits(params: "ExitParams", exits: Sequence[int]) -> Problems:
    """What a request names or needs beside a model's exits."""
    named = [(f"thresholds.{layer}", layer) for layer in params.thresholds]
    for field, layers in (
        ("exits", params.exits),
        ("sled.layers", params.sled.layers),
        ("dola.layers", params.dola.layers),
    ):
        named += [(f"{field}.{number}", layer) for number, layer in enumerate(layers or ())]
    if params.draft_exit != "auto":
        named.append(("draft_exit", params.draft_exit))
    for field, layer in named:
        if layer not in exits:
            others = f", only after {list(exits)}" if exits else ": exits.layers is empty"
            yield f"inference.exit.{field}", f"there is no exit after layer {layer}{others}"
    if params.mode == "speculative" and not params.may_draft(exits):
        yield "inference.exit.mode", f"speculative, but {_none_of(exits)} may draft"
    if params.mode in ("sled", "dola") and not params.heard(exits):
        yield "inference.exit.mode", f"{params.mode}, but {_none_of(exits)} is listened to"


def _none_of(exits: Sequence[int]) -> str:
    return f"none of the exits after layers {list(exits)}" if exits else "no exit is there, so none"


def exits_problems(exits: "ExitsConfig") -> Problems:
    """What LayerSkip's recipe does not go with, within the section `exits`."""
    others = {exits.head} if isinstance(exits.head, str) else set(exits.head)
    others -= {"norm"}
    if exits.norm == "shared" and others:
        yield "norm", f"shared needs exits that are no more than a norm, not head {' or '.join(sorted(others))}"
    if (recipe := exits.layerskip) is None:
        return
    if not exits.layers:
        yield "layerskip", "needs exits, but exits.layers is empty"
    if exits.weights:
        yield "weights", "is what exits.layerskip replaces: leave it out"
    if exits.weight_schedule != type(exits.weight_schedule)():
        yield "weight_schedule", "is what exits.layerskip replaces: leave it out"
    if recipe.curriculum == "rotational" and recipe.rotation is None:
        yield "layerskip.rotation", "null, but curriculum rotational needs a number of layers"
    if recipe.curriculum != "rotational" and recipe.rotation is not None:
        yield "layerskip.rotation", f"{recipe.rotation} is for curriculum rotational, not {recipe.curriculum}"


def _layer_problems(config: "Config") -> Problems:
    num_layers, exits = config.model.num_layers, config.exits.layers
    for number, layer in enumerate(exits):
        if layer >= num_layers:
            why = ": the last layer's exit is built in" if layer == num_layers else ""
            yield f"exits.layers.{number}", f"{layer} must be below num_layers = {num_layers}{why}"
    yield from unknown_exits(config.inference.exit, exits)


def _pinned_problems(config: "Config") -> Problems:
    """An automatic layout is checked when it is known, where the run is built."""
    parallel, num_layers = config.parallel, config.model.num_layers
    layout = parallel.layout
    if layout == "auto" or len(layout) != parallel.pipeline * parallel.chunks:
        return
    stops = list(accumulate(entry.layers for entry in layout))
    if stops[-1] != num_layers:
        return
    last = len(layout) - 1
    for field, layers in learners_from_final(config.exits).items():
        for layer in layers:
            entry = next((number for number, stop in enumerate(stops) if layer <= stop), last)
            if entry < last and layer == stops[entry] and layout[entry + 1].exits_at_start:
                entry += 1
            if entry != last:
                own, final = (divmod(number, parallel.pipeline)[::-1] for number in (entry, last))
                yield field, apart_from_final(layer, own, final, num_chunks=parallel.chunks)


def _measure_problems(config: "Config") -> Problems:
    params, exits = config.inference.exit, config.exits
    if params.measure != "gate":
        return
    if lacking := [layer for layer in params.may_fire(exits.layers) if exits.gate_of(layer) == "none"]:
        yield "inference.exit.measure", f"gate, but exits.gate is none for the exits after layers {lacking}"
