"""Rows that go deeper wait in queues at their exits, while sequences whose tokens have left begin new ones.

A queue runs on when it fills a launch, when one of it has waited too long, or when waiting no longer pays. With S rows
that could begin anew, R that have begun since all queues were last empty, at cost C, and F(R) what it costs to take all
that waits to its end, beginning anew pays while

    S / (c(S) + F(R + S) - F(R))  >=  m R / (C + F(R))

that is, while tokens begin clearly faster than a whole cycle makes them, by a margin m. F expects as many of the new
tokens at each depth as went there before, and counts rows that have left but whose skipped layers are still owed: they
run along. Where rows cost nothing that is about the best number of shallow launches t in [(1 - (1-q)^t) / q] (a1 + a2)
/ (t a1 + a2). Where it is 1, all are taken on at once: as with compaction.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.fronts import Front, by_depth

_MARGIN, _MARGIN_OF_FEW = 1.1, 1.4
"""How much faster they have to begin, where there are more sequences than fill a launch, and where there are not: costs
are estimates, and waiting fills launches for the many, while it makes those of the few smaller. With 1.1 these lose 2
to 4 % to lockstep on a CPU."""
_REMEMBERED = 1024
"""Tokens after which the counts of those that went deeper are halved."""


class Rebatch:
    """
    Args:
        costs: of launches.
        depths: where rows begin, may wait, and end, ascending: 0, exits and the number of layers, or those of a stage.
        launch_rows: rows that fill a launch.
        max_wait: launches after which a row goes on, whoever goes with it.
    """

    carries = False

    def __init__(self, costs: SegmentCosts, depths: Sequence[int], *, launch_rows: int, max_wait: int) -> None:
        self._costs, self._depths, self._entry = costs, tuple(depths), depths[0]
        self._launch_rows, self._max_wait = launch_rows, max_wait
        self._tokens = dict.fromkeys(self._depths[:-1], 1.0)
        self._begin_cycle()

    def choose(self, fronts: Sequence[Front], launch: int) -> Sequence[Front]:
        queues = by_depth(fronts)
        chosen = self._choose(queues, launch)
        taken = chosen[: self._launch_rows]
        at, stop = taken[0].at, min(front.stop for front in taken)
        self._spent += self._launch_cost(at, stop, sum(front.rows for front in taken), len(taken))
        self._count(at, len(taken))
        if at == self._entry:
            self._begun += len(taken)
            self._owed += sum(front.rows for front in taken if front.owes)
        return chosen

    def _choose(self, queues: Mapping[int, list[Front]], launch: int) -> list[Front]:
        waiting = [depth for depth in queues if depth > self._entry]
        if not waiting:
            self._begin_cycle()
            return queues[self._entry]
        for depth in reversed(waiting):
            if launch - queues[depth][0].since > self._max_wait or self._fills(queues[depth]):
                return queues[depth]
        if self._entry not in queues or not self._begins(queues):
            self._flushes = True
        return queues[waiting[0] if self._flushes else self._entry]

    def _fills(self, queue: Sequence[Front]) -> bool:
        return len(queue) >= self._launch_rows

    def _begin_cycle(self) -> None:
        self._spent = 0.0
        self._begun = self._owed = 0
        self._flushes = False

    def _begins(self, queues: Mapping[int, list[Front]]) -> bool:
        """Whether beginning new tokens pays more than taking on those that wait."""
        if self._flushes:
            return False
        new = queues[self._entry][: self._launch_rows]
        owed = sum(front.rows for front in new if front.owes)
        to_the_end = self._to_the_end(queues, 0, self._owed)
        cost = self._launch_cost(self._entry, min(front.stop for front in new), len(new), len(new))
        cost += self._to_the_end(queues, len(new), self._owed + owed) - to_the_end
        are_few = sum(map(len, queues.values())) <= self._launch_rows
        margin = _MARGIN_OF_FEW if are_few else _MARGIN
        return len(new) * (self._spent + to_the_end) >= margin * self._begun * cost

    def _to_the_end(self, queues: Mapping[int, list[Front]], new: int, owed: int) -> float:
        """The cost of taking all that waits through all layers, the shallower ones joining the deeper, and what new
        tokens will have there: so many of each go on as did before."""
        cost = 0.0
        rows = new * self._share(self._entry, self._depths[1]) if len(self._depths) > 2 else 0.0
        for before, (start, stop) in zip(self._depths, pairwise(self._depths[1:]), strict=False):
            if before > self._entry:
                rows *= self._share(before, start)
            rows += sum(front.rows for front in queues.get(start, ()))
            cost += self._launch_cost(start, stop, max(rows, owed), rows)
        return cost

    def _launch_cost(self, start: int, stop: int, rows: float, asked: float) -> float:
        """Of layers, and of the head of what is asked there."""
        return self._costs.of(start, stop, rows) + self._costs.of_head(stop, asked)

    def _share(self, start: int, stop: int) -> float:
        """Of tokens that ran on at `start`, those that ran on at `stop`."""
        return min(1.0, self._tokens[stop] / self._tokens[start])

    def _count(self, at: int, tokens: int) -> None:
        """Tokens that ran on there; those of long ago count less."""
        self._tokens[at] += tokens
        if at == self._entry and self._tokens[self._entry] > _REMEMBERED:
            self._tokens = {depth: count / 2 for depth, count in self._tokens.items()}
