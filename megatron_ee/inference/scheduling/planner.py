"""From where sequences are to the next launch."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from megatron_ee.inference.scheduling.fronts import Front, LaunchPlan
from megatron_ee.inference.scheduling.strategies import Strategy

Ready = Callable[[int, int, int], int]
"""(slot, start, stop) -> positions of a sequence that wait at `start` and could run to `stop`."""


class Planner:
    """
    Args:
        launch_rows: tokens that fill a launch; what there is more of runs later. Rows of earlier tokens that a token
            takes along need no room: they have to run, and no launch is as cheap for them.
        prefill_chunk: rows of prompts that run together.
        entry: layers that those have run that begin here.

    Attributes:
        launch_rows: as given.
    """

    def __init__(self, strategy: Strategy, *, launch_rows: int, prefill_chunk: int, entry: int = 0) -> None:
        self._strategy, self.launch_rows, self._chunk = strategy, launch_rows, prefill_chunk
        self._entry = entry

    @property
    def carries(self) -> bool:
        """Whether rows that have left run on with the others, whatever their requests say."""
        return self._strategy.carries

    def plan(self, fronts: Sequence[Front], launch: int, fillers: Collection[int], ready: Ready) -> LaunchPlan:
        """
        Args:
            fronts: of all sequences that go on; one at least.
            fillers: slots of sequences whose waiting positions may run along.
            ready: how many of them there are.
        """
        taken = self._within_limits(self._strategy.choose(fronts, launch))
        start, stop = taken[0].at, min(front.stop for front in taken)
        counts = {front.slot: front.rows for front in sorted(taken)}  # neighbours' keys are read without a copy
        on_their_way = {front.slot for front in fronts if front.at > self._entry or front.at == start}
        room = None if self._strategy.carries else self.launch_rows - len(counts)
        fills = fills_of([slot for slot in fillers if slot not in on_their_way], start, stop, ready, room)
        return LaunchPlan(start, stop, counts, fills)

    def _within_limits(self, fronts: Iterable[Front]) -> list[Front]:
        """As many as fit; the first one in any case. A prompt takes room of its own."""
        taken: list[Front] = []
        tokens = prompts = 0
        for front in fronts:
            is_prompt = front.at == 0 and front.rows > 1
            fits = prompts + front.rows <= self._chunk if is_prompt else tokens < self.launch_rows
            if not taken or fits:
                taken.append(front)
                tokens, prompts = (tokens, prompts + front.rows) if is_prompt else (tokens + 1, prompts)
        return taken


def fills_of(slots: Iterable[int], start: int, stop: int, ready: Ready, room: int | None) -> Mapping[int, int]:
    """Positions of sequences that wait at `start`, as many as there is room for; None: all."""
    fills: dict[int, int] = {}
    for slot in slots if start else ():
        count = ready(slot, start, stop)
        if room is not None:
            count = min(count, room)
            room -= count
        if count > 0:
            fills[slot] = count
    return fills
