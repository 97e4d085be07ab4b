"""Where X goes among a stage's F and B: one rule for all schedules.

On a stage that waits for gradients, the exits of all micro-batches that have run forward run just before the next such
wait: after a run of forwards, so that none of its outputs leaves later for them, and before the gradient is needed.
After warm-up, 1F1B then reads F, send, X, receive, B. Compared by simulation with X right after each F and with X just
before its own B (1F1B, P = 8, M = 16, F = 1, B = 2, X = 3h on every stage, transfer 0.05; each duration times a
log-normal factor, sigma 0.1; step time over the same pipeline without early exits, mean of 100):

                         h = .25     .5      1      2
  before the next wait     1.010  1.003  1.003  1.009
  right after each F       1.010  1.004  1.004  1.013
  just before its own B    1.011  1.008  1.013  1.025

Without the jitter all three are 1.000. With none, one or two such exits on each early stage (1,500 draws, no jitter)
the first is the fastest of the three in every draw; the third is 1.4 % slower on average and 15 % at worst, because the
wait of the warm-up goes unused and the exits left over delay gradients in the cool-down. Under GPipe, X right after F
holds up the later stages: 21 % slower on average.

A chunk that waits for no gradient has nothing to hide X in. The last one runs X just before its own B, so that the
first gradient leaves early; without any B, X follows its F, so that one micro-batch's hidden states are kept at a time.
(EE-LLM, Chen et al. 2023, runs the exits' backward in B, after the wait.)

A fill that turns round on a stage waits for nothing there either.
"""

from collections.abc import Hashable, Sequence, Set
from typing import TypeVar

from megatron_ee.parallel.pipeline.plan import Kind

Key = TypeVar("Key", bound=Hashable)


def place_exits(
    steps: Sequence[tuple[Kind, Key]], *, with_exits: Set[Key], wait_for_none: Set[Key], release: bool = False
) -> list[tuple[Kind, Key]]:
    """One stage's F and B in order, with an X put in for each key of `with_exits`.

    Args:
        steps: kind, and what says which F, X and B belong together: chunk and micro-batch, for example.
        wait_for_none: those whose B waits for no gradient from another stage.
        release: put each X just before its own B, whatever that waits for.
    """
    with_backward = {key for kind, key in steps if kind is Kind.B}
    placed: list[tuple[Kind, Key]] = []
    pending: list[Key] = []
    for kind, key in steps:
        if kind is Kind.B and pending:
            alone = release or key in wait_for_none
            due = [other for other in pending if (other == key if alone else other not in wait_for_none)]
            placed += [(Kind.X, other) for other in due]
            pending = [other for other in pending if other not in due]
        placed.append((kind, key))
        if kind is Kind.F and key in with_exits:
            if key in with_backward:
                pending.append(key)
            else:
                placed.append((Kind.X, key))
    return placed
