"""1F1B with extra micro-batches, the fills, in the time that it leaves idle at its two ends.

The idea is EE-LLM's (Chen et al. 2023, section 4.2); the order is another one. All micro-batches enter the pipeline in
one order: regular ones, all fills of the warm-up, the other regular ones, the fills of the cool-down. Each stage then
runs by 1F1B's own rule: forwards for as long as it holds fewer micro-batches than 1F1B would, P - s on stage s, then
the next backward. A fill that turns round on a stage runs F, X and B there at once. Three properties follow for any
fills, in any order, and any durations:

- **Memory.** No stage ever holds more micro-batches than 1F1B at its peak: a fill takes the place of a regular one.
- **Order.** A stage runs forwards in the order in which the one before it did, and backwards in that of the one after
  it: what arrives is worked on at once.
- **No deadlock.** Where a stage waits for its n-th gradient from the next, it has sent n - 1 + P - s outputs there, or
  all. The next needs n - 1 + P - s - 1 at most to give that gradient.

**Where the fills of the warm-up enter.** After P - 1 - t regular micro-batches, t being the deepest stage where one of
them turns: what 1F1B runs there before its first steady forward. The first stage runs its other forwards between the
fills' backwards; that is early enough, since the last stage takes a micro-batch only every F + B. If they entered
after P - 1, all that the first stage runs before its first wait, only one could be under way at a time: with P = 8,
F = 1, B = 2 and X = 0 the warm-up would have room for 4 pieces of F and B instead of 15. The deepest had best come
first, so that the others run while it is away.

**The fills of the cool-down** continue 1F1B as though there were more micro-batches. On a stage that doesn't train one,
only its F is left, in the gap between two backwards.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

from megatron_ee.parallel.pipeline.plan import Fill, Kind

Lane = tuple[tuple[Kind, int], ...]
"""A stage's work in order, with the micro-batch's number."""


@lru_cache(maxsize=1)  # a schedule gives one stage at a time, and a stage's order depends on those after it
def filled_lanes(num_stages: int, num_microbatches: int, fills: tuple[Fill, ...]) -> tuple[Lane, ...]:
    """The F and B of each stage.

    Args:
        num_microbatches: the regular ones; the fills are numbered after them.
    """
    entering = _entering(num_stages, num_microbatches, fills)
    fill_of = dict(enumerate(fills, start=num_microbatches))
    lanes: list[Lane] = []
    returning: Sequence[int] = ()
    for stage in reversed(range(num_stages)):
        beyond = {i for i, fill in fill_of.items() if not fill.runs_forward(stage)}
        turning = set(entering) if stage == num_stages - 1 else turning_at(stage, num_microbatches, fills)
        forwards = [i for i in entering if i not in beyond]
        capacity = min(num_stages - stage, num_microbatches)
        lane = list(_one_forward_one_backward(forwards, returning, turning, capacity))
        returning = [i for kind, i in lane if kind is Kind.B]
        # As though it trained every fill that comes through: only now what it doesn't run is left out.
        untrained = {(Kind.B, i) for i, fill in fill_of.items() if not fill.trains(stage)}
        lanes.append(tuple(step for step in lane if step not in untrained) if untrained else tuple(lane))
    return tuple(reversed(lanes))


def turning_at(stage: int, num_microbatches: int, fills: tuple[Fill, ...]) -> set[int]:
    """The micro-batches that turn round on a stage that isn't the last."""
    numbered = enumerate(fills, start=num_microbatches)
    return {i for i, fill in numbered if fill.kind == "warmup" and fill.stage == stage}


def check_fills(num_stages: int, num_chunks: int, has_exits: tuple[bool, ...], fills: tuple[Fill, ...]) -> None:
    """Raise ValueError for a fill that the pipeline has no place for."""
    if fills and num_chunks > 1:
        raise ValueError(f"fills need one chunk a stage, not {num_chunks}")
    for fill in fills:
        if fill.kind == "cooldown" and fill.stage not in range(1, num_stages):
            raise ValueError(f"{fill}: the last stage that trains it is from 1 to {num_stages - 1}")
        if fill.kind == "warmup" and fill.stage not in range(num_stages - 1):
            raise ValueError(f"{fill}: it turns round before the last of {num_stages} stages")
        if fill.kind == "warmup" and not has_exits[fill.stage]:
            raise ValueError(f"{fill}: the stage where it turns round has no exit")


def _entering(num_stages: int, num_microbatches: int, fills: tuple[Fill, ...]) -> list[int]:
    """All micro-batches in the order in which the first stage runs them forward."""
    numbered = list(enumerate(fills, start=num_microbatches))
    of_warmup = [(i, fill.stage) for i, fill in numbered if fill.kind == "warmup"]
    of_cooldown = [i for i, fill in numbered if fill.kind == "cooldown"]
    deepest = max((stage for _, stage in of_warmup), default=0)
    num_first = min(num_stages - deepest, num_microbatches) - 1
    regular = range(num_microbatches)
    return [*regular[:num_first], *(i for i, _ in of_warmup), *regular[num_first:], *of_cooldown]


def _one_forward_one_backward(
    forwards: Sequence[int], returning: Sequence[int], turning: set[int], capacity: int
) -> Iterator[tuple[Kind, int]]:
    """One stage's F and B of micro-batches: those of `turning` run B at once, the others as they come back."""
    alive = 0
    gradients = iter(returning)
    for i in forwards:
        if alive == capacity:
            yield Kind.B, next(gradients)
            alive -= 1
        yield Kind.F, i
        if i in turning:
            yield Kind.B, i
        else:
            alive += 1
    yield from ((Kind.B, i) for i in gradients)
