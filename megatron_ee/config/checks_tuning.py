"""Rules of training exits alone, on a model that stays as it is."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ee.config.checks_exits import learners_from_final

if TYPE_CHECKING:
    from megatron_ee.config.schema import Config

FORWARD_ONLY_SCHEDULES = ("1f1b", "gpipe")
"""What stands for the one order in which a step without backwards between stages runs."""


def tuning_problems(config: "Config") -> Iterator[tuple[str, str]]:
    """What doesn't go with `training.trains: exits`."""
    if config.training.trains != "exits":
        return
    if config.checkpoint.initial is None:
        yield "training.trains", "exits needs checkpoint.initial, the run whose model gets exits"
    if not config.exits.layers:
        yield "training.trains", "exits needs an exit to train, but exits.layers is empty"
    if config.parallel.schedule not in FORWARD_ONLY_SCHEDULES:
        allowed = " or ".join(FORWARD_ONLY_SCHEDULES)
        yield (
            "parallel.schedule",
            f"{config.parallel.schedule} orders backwards between stages, of which training.trains: exits has none; "
            f"take {allowed}, which are the same there",
        )
    yield from _exits_problems(config)
    yield from _trunk_problems(config)


def _exits_problems(config: "Config") -> Iterator[tuple[str, str]]:
    exits = config.exits
    for field, layers in learners_from_final(exits).items():
        if layers:
            yield field, "needs the final exit, which training.trains: exits doesn't run"
    if exits.layerskip is not None:
        yield "exits.layerskip", "weighs the final exit too, which training.trains: exits doesn't run"
    idle = [
        layer
        for layer in exits.layers
        if exits.norm == "shared" and exits.projection_of(layer) == "shared" and exits.gate_of(layer) == "none"
    ]
    if idle:
        yield "training.trains", f"exits, but those after layers {idle} have no norm, projection or gate of their own"


def _trunk_problems(config: "Config") -> Iterator[tuple[str, str]]:
    if config.training.layer_dropout is not None:
        yield "training.layer_dropout", "skips layers that training.trains: exits leaves as they are"
    if config.training.recompute != "none":
        yield (
            "training.recompute",
            f"{config.training.recompute} saves what layers keep for a backward, and with trains: exits they keep "
            "nothing",
        )
    if config.exits.release:
        yield "exits.release", "true waits for the layers' backward, of which training.trains: exits has none"
