"""Rows that go deeper wait in queues at their exits, while sequences whose tokens have left begin new ones.

A queue runs on when it fills a launch, when one of it has waited too long, or when waiting no longer pays. With S rows
that could begin anew, R that have begun since all queues were last empty, at cost C, and F what it costs to take all
that waits to its end, beginning anew pays while

    S / c(S)  >=  R / (C + F)

that is, while tokens begin faster than a whole cycle makes them. With equal costs that is the best number of shallow
launches t in [(1 - (1-q)^t) / q] (a1 + a2) / (t a1 + a2). Where it is 1, all are taken on at once: as with compaction.
"""

from collections.abc import Mapping, Sequence

from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.fronts import Front, by_depth


class Rebatch:
    """
    Args:
        costs: of launches.
        depths: where rows may wait or end: exits and the number of layers, ascending.
        launch_rows: rows that fill a launch.
        max_wait: launches after which a row goes on, whoever goes with it.
    """

    carries = False

    def __init__(self, costs: SegmentCosts, depths: Sequence[int], *, launch_rows: int, max_wait: int) -> None:
        self._costs, self._depths = costs, tuple(depths)
        self._launch_rows, self._max_wait = launch_rows, max_wait
        self._begun, self._spent = 0.0, 0.0
        self._flushes = False

    def choose(self, fronts: Sequence[Front], launch: int) -> Sequence[Front]:
        queues = by_depth(fronts)
        chosen = self._choose(queues, launch)
        rows = sum(front.rows for front in chosen[: self._launch_rows])
        at = chosen[0].at
        self._spent += self._costs.of(at, min(front.stop for front in chosen), rows)
        if at == 0:
            self._begun += min(self._launch_rows, len(chosen))
        return chosen

    def _choose(self, queues: Mapping[int, list[Front]], launch: int) -> list[Front]:
        waiting = [depth for depth in queues if depth > 0]
        if not waiting:
            self._begun = self._spent = 0.0
            self._flushes = False
            return queues[0]
        for depth in reversed(waiting):
            if launch - queues[depth][0].since > self._max_wait or self._fills(queues[depth]):
                return queues[depth]
        if 0 not in queues or not self._begins(queues):
            self._flushes = True
        return queues[waiting[0] if self._flushes else 0]

    def _fills(self, queue: Sequence[Front]) -> bool:
        return len(queue) >= self._launch_rows

    def _begins(self, queues: Mapping[int, list[Front]]) -> bool:
        """Whether beginning new tokens pays more than taking on those that wait."""
        if self._flushes:
            return False
        new = min(self._launch_rows, len(queues[0]))
        cost = self._costs.of(0, min(front.stop for front in queues[0]), new)
        return new * (self._spent + self._to_the_end(queues)) >= self._begun * cost

    def _to_the_end(self, queues: Mapping[int, list[Front]]) -> float:
        """The cost of taking all that waits through all layers, the shallower ones joining the deeper."""
        cost, rows = 0.0, 0
        for start, stop in zip(self._depths, self._depths[1:], strict=False):
            rows += sum(front.rows for front in queues.get(start, ()))
            cost += self._costs.of(start, stop, rows)
        return cost
