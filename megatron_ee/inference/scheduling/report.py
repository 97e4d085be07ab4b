"""How requests were served, simulated or measured: throughput, what they waited, and how full launches were."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from megatron_ee.inference.scheduling.costs import Segment
from megatron_ee.inference.scheduling.simulate import SimulatedRun
from megatron_ee.inference.scheduling.slots import SlotUse, StageUse


class Percentiles(NamedTuple):
    """Between two values on a straight line. None: there are no values."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        ordered = sorted(values)
        return cls(*(_percentile(ordered, share) for share in (0.5, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class Report:
    """Times are in the unit of those that it was made from.

    Attributes:
        seconds: from the first arrival to the last token.
        first_token: from a request's arrival to its first token.
        token: between the tokens of a request.
        request: from a request's arrival to its last token.
        forced: tokens that left at another depth than their own.
        use: by segment.
        stages: of a pipeline, what each did; none: there is no pipeline.
    """

    requests: int
    tokens: int
    seconds: float
    first_token: Percentiles
    token: Percentiles
    request: Percentiles
    forced: int
    use: Mapping[Segment, SlotUse]
    stages: Sequence[StageUse] = ()

    @property
    def tokens_per_second(self) -> float:
        """0 without tokens."""
        return self.tokens / self.seconds if self.seconds else 0.0


def report_of(
    arrivals: Sequence[float],
    times: Sequence[Sequence[float]],
    use: Mapping[Segment, SlotUse],
    *,
    forced: int = 0,
    stages: Sequence[StageUse] = (),
) -> Report:
    """
    Args:
        arrivals: of each request.
        times: of each request, when each of its tokens was said, by the same clock; one without tokens counts as a
            request, and in no percentile.
    """
    said = [(arrival, of) for arrival, of in zip(arrivals, times, strict=True) if of]
    return Report(
        requests=len(arrivals),
        tokens=sum(len(of) for _, of in said),
        seconds=max(of[-1] for _, of in said) - min(arrivals) if said else 0.0,
        first_token=Percentiles.of([of[0] - arrival for arrival, of in said]),
        token=Percentiles.of([after - before for _, of in said for before, after in pairwise(of)]),
        request=Percentiles.of([of[-1] - arrival for arrival, of in said]),
        forced=forced,
        use=use,
        stages=stages,
    )


def report_of_run(run: SimulatedRun) -> Report:
    return report_of([of.arrival for of in run.requests], run.times, run.use, forced=run.forced, stages=run.stages)


def as_json(report: Report) -> dict[str, Any]:
    """What a file of results has of it."""
    content: dict[str, Any] = {
        "requests": report.requests,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "tokens_per_second": report.tokens_per_second,
        **{name: getattr(report, name)._asdict() for name in ("first_token", "token", "request")},
        "forced": report.forced,
        "slots": [
            {
                "layers": [start + 1, stop],
                "launches": of.launches,
                "rows_a_launch": of.rows_a_launch,
                "catch_ups": of.catch_ups,
                **dict(zip(("real", "filled", "empty"), of.shares, strict=True)),
            }
            for (start, stop), of in report.use.items()
        ],
    }
    if report.stages:
        content["stages"] = [dict(zip(("real", "filled", "idle"), of.shares, strict=True)) for of in report.stages]
    return content


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = ordered[math.floor(place)]
    return low + (ordered[math.ceil(place)] - low) * (place - math.floor(place))
