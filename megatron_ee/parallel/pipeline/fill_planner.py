"""Which fills cost nothing: micro-batches beside the regular ones that neither lengthen a step nor need more memory.

Fills are added one at a time and kept if the step is as long as without them. Those of the cool-down come first, and
of them those that train the most stages: what comes later has less time to come back. Those of the warm-up go deepest
first, once for each stage that can be the deepest, since that decides where they enter (see `fills.py`): a deep one
holds much work, but takes the time of several others. In the other order, fills of the warm-up would use up the slack
with which the early stages reach the cool-down, and leave less room there than they take (P = 12, M = 24, F = 1, B = 2,
X = .6: 27 pieces of F, X and B instead of 50). Memory never grows, whatever the fills: see `fills.py`.

The fills use up slack, so that durations that vary delay a step a little more: F = 1, B = 2 and X = .3 times a
log-normal factor, sigma .1, make it 1.3 % longer than with 1F1B (P = 8, M = 16, mean of 40); sigma .02, 0.4 %.

How many can there be? F = 1, B = r and X = 0 on all of P stages leave stage s idle for r (P-1-s) in the warm-up, so it
has room for floor(r (P-1-s) / (1+r)) fills there; and in the cool-down, where a fill can't come earlier, for
floor(r s / (1+r)). A warm-up fill that enters after all forwards of 1F1B's warm-up, as in EE-LLM, arrives s later: that
leaves only floor((r (P-1-s) - s) / (1+r)).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate

from megatron_ee.parallel.pipeline.exits import place_exits
from megatron_ee.parallel.pipeline.fills import filled_lanes, turning_at
from megatron_ee.parallel.pipeline.plan import Fill, Kind
from megatron_ee.parallel.pipeline.schedules import Pipeline
from megatron_ee.parallel.pipeline.simulate import StageCosts

_TOLERANCE = 1e-9  # relative: sums of the same durations in another order
_SHORT = 32  # micro-batches, or one for each stage: both ends of a step, where all idle time is, in full
_MOST_TRIED = 16  # stages where the deepest fill may turn: of more, the best is searched for

_F, _X = Kind.F, Kind.X  # looked up a million times

Fills = tuple[Fill, ...]
Fits = Callable[[Fills], bool]


def plan_fills(
    pipeline: Pipeline,
    costs: StageCosts,
    *,
    transfer: float = 0.0,
    release_exits: bool = False,
    tolerance: float = 0.0,
) -> Fills:
    """The fills that a step of filled-1f1b has room for: with them it takes no longer, and no stage holds more.

    A pure function: ranks that give it the same durations get the same fills. It takes a fraction of a second for 8
    stages, and some seconds for 64.

    Args:
        pipeline: without fills; one chunk a stage.
        costs: measured durations of F, X and B on each stage, in any unit.
        transfer: time from a send to the arrival of its message, in the same unit.
        release_exits: as in `build_plan`.
        tolerance: a step may take longer by this share of its length. Gaps between uneven stages are often a little too
            short for a forward.

    Raises:
        ValueError: a negative duration or tolerance, or several chunks a stage.
    """
    if pipeline.num_chunks > 1:
        raise ValueError(f"fills need one chunk a stage, not {pipeline.num_chunks}")
    if not all(duration >= 0 for duration in (*costs.forward, *costs.exit, *costs.backward, transfer, tolerance)):
        raise ValueError(f"nothing may be negative: {costs}, transfer {transfer}, tolerance {tolerance}")

    def no_longer(num_microbatches: int) -> Fits:
        def makespan(fills: Fills) -> float:
            lanes = _lanes(pipeline, num_microbatches, fills, release_exits)
            return makespan_of(lanes, costs, transfer)

        limit = makespan(()) * (1 + tolerance + _TOLERANCE)
        return lambda fills: makespan(fills) <= limit

    stages = range(pipeline.num_stages)
    fits = no_longer(min(pipeline.num_microbatches, max(len(stages), _SHORT)))
    cooldown = _add((), [Fill("cooldown", stage) for stage in stages[1:]], fits, most=len(stages))
    turns = [stage for stage in stages[:-1] if pipeline.has_exits[stage]]
    warmup = _plan_warmup(turns, costs, lambda fills: fits(fills + cooldown))
    return _shorten(warmup, cooldown, no_longer(pipeline.num_microbatches))


def makespan_of(lanes: Sequence[Sequence[tuple[Kind, int]]], costs: StageCosts, transfer: float = 0.0) -> float:
    """What `simulate` says of the same work, without its rules and messages, which take it most of its time.

    Args:
        lanes: each stage's F, X and B in order, with the micro-batch's number; links keep these orders.
    """
    stages = [_Stage(lane, *durations) for lane, durations in zip(lanes, _by_stage(costs), strict=True)]
    neighbours = [*zip([None, *stages[:-1]], stages, [*stages[1:], None], strict=True)]
    while any(stage.held_up for stage in stages):
        went_on = [
            stage.go_on(before, after, transfer) for before, stage, after in (*neighbours, *reversed(neighbours))
        ]
        assert any(went_on), "fills don't deadlock"
    return max(stage.now for stage in stages)


class _Stage:
    """How far one stage has come."""

    def __init__(self, lane: Sequence[tuple[Kind, int]], forward: float, exits: float, backward: float) -> None:
        self.left, self.now = iter(lane), 0.0
        self.held_up = next(self.left, None)  # the next piece of work, which may have to wait
        self.forward, self.exits, self.backward = forward, exits, backward
        self.trained = {i for kind, i in lane if kind is Kind.B}
        self.outputs: dict[int, float] = {}
        self.gradients: dict[int, float] = {}

    def go_on(self, before: "_Stage | None", after: "_Stage | None", transfer: float) -> bool:
        """Work until something is missing; whether any work was done."""
        step, now = self.held_up, self.now
        outputs, gradients = self.outputs, self.gradients
        inputs = before.outputs if before else None
        returning, trained = (after.gradients, after.trained) if after else ({}, set())
        while step is not None:
            kind, i = step
            if kind is _F:
                if inputs is not None:
                    arrival = inputs.get(i)
                    if arrival is None:
                        break
                    if arrival + transfer > now:
                        now = arrival + transfer
                now += self.forward
                outputs[i] = now
            elif kind is _X:
                now += self.exits
            else:
                if i in trained:
                    arrival = returning.get(i)
                    if arrival is None:
                        break
                    if arrival + transfer > now:
                        now = arrival + transfer
                now += self.backward
                gradients[i] = now
            step = next(self.left, None)
        went_on = step is not self.held_up
        self.held_up, self.now = step, now
        return went_on


def _lanes(pipeline: Pipeline, num_microbatches: int, fills: Fills, release: bool) -> list[list[tuple[Kind, int]]]:
    """Each stage's F, X and B of filled-1f1b, as `build_plan` orders them."""
    last = pipeline.num_stages - 1
    everything = set(range(num_microbatches + len(fills)))
    return [
        place_exits(
            lane,
            with_exits=everything if pipeline.has_exits[stage] else set(),
            wait_for_none=everything if stage == last else turning_at(stage, num_microbatches, fills),
            release=release,
        )
        for stage, lane in enumerate(filled_lanes(pipeline.num_stages, num_microbatches, fills))
    ]


def _plan_warmup(turns: Sequence[int], costs: StageCosts, fits: Fits) -> Fills:
    """The fills that keep the first stages busy the longest; `turns` are the stages where one may turn, in order."""
    up_to = [0.0, *accumulate(map(sum, _by_stage(costs)))]

    @cache
    def deepest_at(index: int) -> Fills:
        candidates = [Fill("warmup", stage) for stage in reversed(turns[: index + 1])]
        return _add((), candidates, fits, most=len(up_to)) if fits((candidates[0],)) else ()

    def gain(index: int) -> float:
        return sum(up_to[fill.stage + 1] for fill in deepest_at(index))

    return deepest_at(_peak(len(turns), gain)) if turns else ()


def _peak(number: int, gain: Callable[[int], float]) -> int:
    """The index below `number` where `gain` is highest: of all, or as far as a few steps up the slope lead."""
    if number <= _MOST_TRIED:
        return max(range(number), key=gain)
    best, step = number // 2, number // 4
    while step > number // _MOST_TRIED:
        best = max((best, max(best - step, 0), min(best + step, number - 1)), key=gain)
        step //= 2
    return best


def _add(fills: Fills, candidates: Iterable[Fill], fits: Fits, *, most: int) -> Fills:
    """`fills` and as many of each candidate as fit, one after another; `most` of each, should they take no time."""
    for candidate in candidates:
        for _ in range(most):
            if not fits((*fills, candidate)):
                break
            fills = (*fills, candidate)
    return fills


def _shorten(warmup: Fills, cooldown: Fills, fits: Fits) -> Fills:
    """As many of the fills as fit, from the first of each kind."""
    while (warmup or cooldown) and not fits(warmup + cooldown):
        if len(cooldown) >= len(warmup):
            cooldown = cooldown[:-1]
        else:
            warmup = warmup[:-1]
    return warmup + cooldown


def _by_stage(costs: StageCosts) -> Iterator[tuple[float, float, float]]:
    """F, X and B of each stage."""
    return zip(costs.forward, costs.exit, costs.backward, strict=True)
