"""What each stage of a pipeline runs next, when it has nothing to do.

A token that leaves comes back to the first stage at once, while those that go deeper pass from stage to stage: with
many sequences, each is to be somewhere else. So of those that could begin, only as many do as keep them spread: with N
sequences whose tokens take as long as m launches of the first stage, N / m. Where all go through P equal stages that is
N / P; where they leave after half of them, twice as many. Depths that differ spread them anyway, and who is held back
loses time: so with d = standard deviation over mean of how deep tokens go, up to 1 + 2 d times as many begin, as long
as the launch takes no more than 1 + d / 2 times as long.

A stage that nobody has come to fills in keys and values of tokens that have left, if it is done before somebody may
come.
"""

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.fronts import Front, LaunchPlan
from megatron_ee.inference.scheduling.planner import Planner, Ready, fills_of
from megatron_ee.inference.stages import Stages
from megatron_ee.inference.timetable import Coming

_REMEMBERED = 256
"""Tokens after which older ones count less in how deep tokens go."""
_IN_TIME = 1.1
"""What is filled in may take so much longer than it takes until somebody may come: estimates are no better."""
_LONGER, _MORE = 0.5, 2.0
"""Of d, see above. Over loads of several kinds, with rows that cost from nothing to all, it is 5 % slower at most
than the faster one of holding back nobody and always all but N / m."""
_ROUNDING = 1e-9


class StagePlanner:
    """
    Args:
        planners: of each stage.
        costs: of launches.
        depths: where rows may wait.
        spreads: whether those that could begin are held back so that all are spread.
    """

    def __init__(
        self,
        planners: Sequence[Planner],
        costs: SegmentCosts,
        stages: Stages,
        depths: Sequence[int],
        *,
        spreads: bool = True,
    ) -> None:
        self.stages, self._planners, self._costs = stages, tuple(planners), costs
        self._depths, self._spreads = tuple(depths), spreads
        self._tokens, self._sum, self._squares = 0.0, 0.0, 0.0
        self._known: dict[tuple[int, int, int], float] = {}

    @property
    def carries(self) -> bool:
        return self._planners[0].carries

    @property
    def launch_rows(self) -> int:
        return self._planners[0].launch_rows

    def cost_of(self, plan: LaunchPlan) -> float:
        rows = self._cost(plan.start, plan.stop, plan.num_rows)
        return rows + self._costs.of_head(plan.stop, len(plan.counts))

    def saw(self, depth: int) -> None:
        """A token has been said after so many layers."""
        if self._tokens >= _REMEMBERED:
            self._tokens, self._sum, self._squares = self._tokens / 2, self._sum / 2, self._squares / 2
        cost = self._cost(0, depth, 1)
        self._tokens += 1
        self._sum += cost
        self._squares += cost * cost

    def plan(
        self,
        stage: int,
        fronts: Sequence[Front],
        launch: int,
        fillers: Collection[int],
        ready: Ready,
        *,
        residents: int,
        coming: Coming | None,
        urgent: Collection[int] = (),
    ) -> LaunchPlan | None:
        """The next launch of a stage that has nothing to do; None: there is none yet.

        Args:
            fronts: of all sequences that go on and are not under way.
            fillers, ready: see `Planner.plan`.
            residents: sequences that go on.
            coming: who may come to the stage next; None: nobody is on the way.
            urgent: sequences of which so many positions wait that they may not go on.
        """
        start, stop = self.stages.start(stage), self.stages.stops[stage]
        own = [front for front in fronts if start <= front.at < stop]
        if stage == 0 and self._spreads:
            own = self._spread(own, residents)
        if own:
            plan = self._planners[stage].plan(own, launch, fillers, ready)
            return self._with_urgent(plan, {front.slot for front in own}, urgent, ready)
        if (catching_up := self._fill(start, stop, urgent, ready, room=None)) is not None:
            return catching_up
        filling = self._fill(start, stop, fillers, ready, room=self.launch_rows)
        return filling if filling is not None and self._is_worth_it(filling, coming) else None

    def _is_worth_it(self, filling: LaunchPlan, coming: Coming | None) -> bool:
        """It is while nobody can come before it ends; or where it makes up for the time that it keeps somebody waiting,
        who need not take these rows along."""
        if coming is None:
            return True
        rows, segment = filling.num_rows, (filling.start, filling.stop)
        late = self._cost(*segment, rows) - coming.left * _IN_TIME
        return late <= self._cost(*segment, rows + coming.tokens) - self._cost(*segment, coming.tokens)

    def _spread(self, fronts: Sequence[Front], residents: int) -> list[Front]:
        """Those that are under way in the stage, prompts, and so many of those that could begin."""
        entering = sorted((of for of in fronts if of.at == 0 and of.rows == 1), key=lambda of: (of.since, of.slot))
        return [of for of in fronts if of.at > 0 or of.rows > 1] + entering[: self._most(len(entering), residents)]

    def _most(self, entering: int, residents: int) -> int:
        """That begin, of those that could."""
        mean, differ = self._cost(0, self.stages.stops[-1], 1), 0.0
        if self._tokens:
            mean = self._sum / self._tokens
            differ = math.sqrt(max(0.0, self._squares / self._tokens - mean * mean)) / mean
        spread = max(1.0, residents * min(1.0, self._first(1) / mean))
        few, many = math.floor(spread + _ROUNDING), math.ceil(spread - _ROUNDING)
        # by few the first stage sets the pace, by many the way of a token through all
        most = few if few * self._first(many) >= spread * self._first(few) else many
        longest = self._first(most) * (1 + _LONGER * differ) * (1 + _ROUNDING)
        limit = min(entering, math.ceil(spread * (1 + _MORE * differ) - _ROUNDING))
        while most < limit and self._first(most + 1) <= longest:
            most += 1
        return most

    def _first(self, tokens: int) -> float:
        """The cost of a launch of the first stage's layers."""
        return self._cost(0, self.stages.stops[0], tokens)

    def _with_urgent(self, plan: LaunchPlan, own: Collection[int], urgent: Collection[int], ready: Ready) -> LaunchPlan:
        more = {slot: count for slot in urgent if slot not in own and (count := ready(slot, plan.start, plan.stop))}
        return LaunchPlan(plan.start, plan.stop, plan.counts, {**plan.fills, **more}) if more and plan.start else plan

    def _fill(
        self, start: int, stop: int, slots: Collection[int], ready: Ready, *, room: int | None
    ) -> LaunchPlan | None:
        """Of the places in a stage where positions wait, the deepest."""
        inside = [depth for depth in self._depths if start <= depth <= stop and depth > 0]
        for at, to in reversed([*pairwise(inside)]):
            if fills := fills_of(slots, at, to, ready, room):
                return LaunchPlan(at, to, {}, fills)
        return None

    def _cost(self, start: int, stop: int, rows: int) -> float:
        """The same few are asked for at every launch."""
        key = start, stop, rows
        if key not in self._known:
            self._known[key] = self._costs.of(*key)
        return self._known[key]
