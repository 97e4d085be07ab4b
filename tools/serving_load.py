"""The load that a simulation serves, as options of a command line say: drawn, or read again from a file."""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from megatron_ee.errors import FieldError
from megatron_ee.inference.scheduling.simulate import SimulatedRequest
from megatron_ee.inference.scheduling.workload import Depths, Lengths, arrivals, drawn_load, read_load

Arrivals = Literal["poisson", "bursts", "at once"]

_DRAWN: dict[str, object] = {
    "prompts": 64.0,
    "answers": 64.0,
    "difficulty": 0.3,
    "arrivals": "at once",
    "rate": None,
    "requests": 200,
    "seed": 0,
}
"""What options of a drawn load are where they are not given."""
_NOT_OF_PROMPTS = ("requests", "prompts", "answers", "depths", "difficulty", "load", "write_load")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    drawn = parser.add_argument_group("a load that is drawn, or read")
    drawn.add_argument("--requests", type=whole(1), metavar="N", help="how many (200)")
    drawn.add_argument("--prompts", type=positive, metavar="MEDIAN", help="tokens; lengths are log-normal (64)")
    drawn.add_argument("--answers", type=positive, metavar="MEDIAN", help="likewise (64)")
    drawn.add_argument(
        "--depths", type=shares, metavar="L:SHARE,...", help="of tokens that leave after layer L: 2:.3,4:.3,8:.4"
    )
    drawn.add_argument(
        "--difficulty", type=share, metavar="X", help="0: each token for itself; 1: a request's are equally deep (0.3)"
    )
    drawn.add_argument("--arrivals", choices=get_args(Arrivals), help="(at once)")
    drawn.add_argument(
        "--rate", type=positive, metavar="X", help="requests a second, or a pass where costs are estimated"
    )
    drawn.add_argument("--seed", type=whole(0), metavar="N", help="(0)")
    drawn.add_argument(
        "--load", type=Path, metavar="FILE", help="a load that --write-load kept, instead of a drawn one"
    )
    drawn.add_argument("--write-load", type=Path, metavar="FILE", help="keep the load, as .jsonl")


def fill_load_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Check what goes together, and put in what is not given."""
    given = [name for name in (*_DRAWN, "depths") if getattr(arguments, name) is not None]
    if arguments.load and given:
        parser.error(f"--{given[0]} draws a load, and --load reads one")
    if arguments.recommend and (
        of := next(
            (
                name
                for name in ("prompts", "answers", "depths", "difficulty", "load", "write_load")
                if getattr(arguments, name) is not None
            ),
            None,
        )
    ):
        parser.error(f"--{of.replace('_', '-')} does not go with --recommend: its load is of your prompts")
    if not arguments.load and not arguments.recommend and arguments.depths is None:
        parser.error("say how deep tokens go: --depths, or --load")
    if arguments.arrivals in ("poisson", "bursts") and arguments.rate is None:
        parser.error(f"--arrivals {arguments.arrivals} needs a --rate")
    for name, value in _DRAWN.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def arrival_times(arguments: argparse.Namespace, count: int) -> list[float]:
    """By --arrivals, --rate and --seed."""
    kind = cast(Arrivals, arguments.arrivals)
    return list(arrivals(kind, count, arguments.rate or 1.0, random.Random(arguments.seed)))


def load_of(arguments: argparse.Namespace, exits: Sequence[int], num_layers: int) -> list[SimulatedRequest]:
    """
    Raises:
        FieldError: a depth is neither an exit nor the number of layers; or the file is none.
    """
    depths = (*exits, num_layers)
    if arguments.load:
        load = read_load(arguments.load)
        for number, of in enumerate(load, start=1):
            looked_at = depths if of.exits is None else (*of.exits, num_layers)
            _check_depths(f"{arguments.load}:{number}", {*looked_at}, depths)
            _check_depths(f"{arguments.load}:{number}", {*of.depths}, looked_at)
        return load
    _check_depths("--depths", arguments.depths, depths)
    return drawn_load(
        arguments.requests,
        Lengths(arguments.prompts),
        Lengths(arguments.answers),
        Depths(arguments.depths, arguments.difficulty),
        arrival_times(arguments, arguments.requests),
        seed=arguments.seed,
    )


def whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    number.__name__ = "whole number"  # what argparse calls it
    return number


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 1")
    return value


def shares(text: str) -> dict[int, float]:
    """`2:.3,8:.7`; they need not add up to 1."""
    found: dict[int, float] = {}
    for part in text.split(","):
        layer, _, value = part.partition(":")
        if not layer.strip().isdecimal() or not value or int(layer) in found:
            raise argparse.ArgumentTypeError(f"{part!r} is no LAYER:SHARE, or its layer comes twice")
        found[int(layer)] = share(value)
    if not sum(found.values()):
        raise argparse.ArgumentTypeError(f"{text}: no token leaves anywhere")
    return found


def _check_depths(where: str, asked: Sequence[int] | set[int] | dict[int, float], depths: Sequence[int]) -> None:
    if unknown := sorted(set(asked) - set(depths)):
        raise FieldError(where, f"no token leaves after layer {unknown[0]}, only after {list(depths)}")
