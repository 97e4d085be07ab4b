"""Loads for the simulator: who comes when, with how long a prompt, and how deep each token goes. Drawn, or read again
from a file."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from megatron_ee.errors import FieldError
from megatron_ee.inference.scheduling.simulate import SimulatedRequest


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens, of a log-normal distribution: most are short, and some are very long.

    Attributes:
        median: half of them are shorter.
        spread: standard deviation of the logarithm; 0: all are the same.
        most: none is longer.
    """

    median: float
    spread: float = 0.6
    most: int = 2048

    def draw(self, numbers: random.Random) -> int:
        drawn = round(self.median * math.exp(numbers.gauss(0, self.spread)))
        return min(self.most, max(1, drawn))


@dataclass(frozen=True, slots=True)
class Depths:
    """How deep tokens go.

    Attributes:
        shares: exit, or the number of layers -> share of all tokens that leave there.
        difficulty: how much requests differ: 0: not at all, each token is for itself; 1: all tokens of a request go
            equally deep.
    """

    shares: Mapping[int, float]
    difficulty: float = 0.3

    def draw(self, count: int, numbers: random.Random) -> tuple[int, ...]:
        """Of the tokens of one request. The shares hold over many requests, whatever the difficulty."""
        layers, reached = sorted(self.shares), list(accumulate(self.shares[layer] for layer in sorted(self.shares)))
        of_request = numbers.random()
        depths = []
        for _ in range(count):
            place = of_request if numbers.random() < self.difficulty else numbers.random()
            depths.append(
                next(layer for layer, share in zip(layers, reached, strict=True) if place * reached[-1] <= share)
            )
        return tuple(depths)


def arrivals(
    kind: Literal["poisson", "bursts", "at once"], count: int, rate: float, numbers: random.Random
) -> Iterator[float]:
    """
    Args:
        rate: requests a unit of time, on the average.
    """
    now = 0.0
    for number in range(count):
        if kind == "poisson":
            now += numbers.expovariate(rate)
        elif kind == "bursts" and number % 8 == 0 and number:
            now += numbers.expovariate(rate / 8)
        yield now


def drawn_load(
    count: int, prompts: Lengths, answers: Lengths, depths: Depths, times: Sequence[float], *, seed: int
) -> list[SimulatedRequest]:
    """So many requests, at these times."""
    numbers = random.Random(seed)
    return [
        SimulatedRequest(prompts.draw(numbers), depths.draw(answers.draw(numbers), numbers), time)
        for time in times[:count]
    ]


def write_load(path: Path, requests: Sequence[SimulatedRequest]) -> None:
    """A line of JSON for each request."""
    path.write_text("".join(json.dumps(asdict(of)) + "\n" for of in requests), encoding="utf-8")


def read_load(path: Path) -> list[SimulatedRequest]:
    """
    Raises:
        FieldError: a line is no request, or there is none.
    """
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            request = SimulatedRequest(
                int(fields["prompt"]),
                tuple(map(int, fields["depths"])),
                float(fields["arrival"]),
                None if fields.get("exits") is None else tuple(map(int, fields["exits"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FieldError(f"{path}:{number}", f"is no request: {error!r}") from error
        if request.prompt < 1 or not request.depths:
            raise FieldError(f"{path}:{number}", "needs one token of a prompt and one of an answer at least")
        if not 0 <= request.arrival < math.inf:
            raise FieldError(f"{path}:{number}", f"comes at {request.arrival}, which is no time from 0 on")
        requests.append(request)
    if not requests:
        raise FieldError(str(path), "holds no request")
    return requests
