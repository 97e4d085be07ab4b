"""Rules between fields: each is a generator of (path, message) pairs."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ee.config.schema import Config

Problems = Iterator[tuple[str, str]]

# Names that need no plug-in, by the field that chooses among them.
BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "parallel.schedule": ("1f1b", "gpipe"),
    "optimizer.backend": ("megatron",),
    "optimizer.lr_decay": ("cosine", "linear", "wsd", "constant"),
    "inference.exit.measure": ("max_probability",),
}


class InvalidFieldsError(ValueError):
    """What is wrong between several fields: (path, message) pairs, so that the loader can point at each of them."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))


def problems_of(config: "Config") -> Problems:
    """All that is wrong between the fields of a config whose fields are right by themselves."""
    yield from _exit_problems(config)
    yield from _layout_problems(config)
    yield from _training_problems(config)
    yield from _name_problems(config)


def _exit_problems(config: "Config") -> Problems:
    num_layers, exits = config.model.num_layers, config.exits.layers
    for layer in exits:
        if layer >= num_layers:
            yield (
                "exits.layers",
                f"{layer} must be below num_layers = {num_layers}: the last layer's exit is built in",
            )
    params = config.inference.exit
    for field, layers in (("exits", params.exits or ()), ("thresholds", params.thresholds)):
        for layer in layers:
            if layer not in exits:
                yield f"inference.exit.{field}", f"there is no exit after layer {layer}, only after {list(exits)}"


def _layout_problems(config: "Config") -> Problems:
    num_layers, pipeline, layout = config.model.num_layers, config.parallel.pipeline, config.parallel.layout
    if layout == "auto":
        if num_layers < pipeline:
            yield "parallel.pipeline", f"{pipeline} stages for {num_layers} layers"
        return
    if len(layout) != pipeline:
        yield "parallel.layout", f"{len(layout)} stages, but parallel.pipeline is {pipeline}"
    stops = list(accumulate(stage.layers for stage in layout))
    if not stops or stops[-1] != num_layers:
        yield "parallel.layout", f"places {sum(stage.layers for stage in layout)} layers of {num_layers}"
    for stage, (border, (left, right)) in enumerate(zip(stops, pairwise(layout), strict=False)):
        if border in config.exits.layers and left.exits_at_end == right.exits_at_start:
            whose = "both" if left.exits_at_end else "neither"
            yield (
                "parallel.layout",
                f"exit {border} is on the border of stages {stage} and {stage + 1} and is given to {whose}: set either "
                f"exits_at_end of the first or exits_at_start of the second, and not both",
            )


def _training_problems(config: "Config") -> Problems:
    if config.training.global_batch_size % config.training.micro_batch_size:
        size = config.training.micro_batch_size
        yield "training.global_batch_size", f"must be a multiple of micro_batch_size = {size}"
    if config.optimizer.min_lr > config.optimizer.lr:
        yield "optimizer.min_lr", f"{config.optimizer.min_lr} is above lr = {config.optimizer.lr}"
    if config.optimizer.lr_decay == "wsd":
        iters = config.optimizer.lr_warmup_iters + config.optimizer.lr_cooldown_iters
        if not config.optimizer.lr_cooldown_iters > 0 or iters > config.training.train_iters:
            yield (
                "optimizer.lr_cooldown_iters",
                f"{config.optimizer.lr_cooldown_iters} must be positive and fit, with the warm-up, "
                f"into train_iters = {config.training.train_iters}",
            )


def _name_problems(config: "Config") -> Problems:
    """Names that are no built-in's. A plug-in may know them: then it is asked once it has been loaded."""
    if config.plugins:
        return
    chosen = {
        "parallel.schedule": config.parallel.schedule,
        "optimizer.backend": config.optimizer.backend,
        "optimizer.lr_decay": config.optimizer.lr_decay,
        "inference.exit.measure": config.inference.exit.measure,
    }
    for path, name in chosen.items():
        if name not in BUILT_IN[path]:
            nearest = get_close_matches(name, BUILT_IN[path], n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            yield path, f"{name!r} must be {' or '.join(map(repr, BUILT_IN[path]))}, or named by one of `plugins`{hint}"
