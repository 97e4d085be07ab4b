"""Answers that full depth judges, too, while nobody waits: see `guard.shadow`. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ee.config import SamplingParams
from megatron_ee.inference.request import Emission, Failure, Request, Scores
from megatron_ee.server.guard.shadow import Shadow, Suspect
from megatron_ee.server.offered import Offered

_MOST_RUNNING = 1


class Judging:
    """
    Args:
        told: of the tokens that left early, how many full depth would have chosen, and how many there were.
    """

    def __init__(self, offered: Offered, told: Callable[[int, int], None]) -> None:
        share = offered.config.serving.shadow
        self._shadow = Shadow(share, num_layers=offered.num_layers, longest=offered.positions)
        self._exits, self._told = offered.exits, told
        self._full = offered.exit.model_copy(update={"mode": "full"})
        self._running: dict[int, Suspect] = {}

    def draw(self, request: Request) -> tuple[Request, bool]:
        """A request as the engine is to have it, and whether its answer is to be judged. What the exits themselves
        think likeliest is noted then; who asks is not told."""
        sampling = request.sampling
        if sampling.logprobs == 0 or not self._shadow.draw(request.exit, self._exits):
            return request, False
        if sampling.logprobs is None:
            sampling = sampling.model_copy(update={"logprobs": 1})
        return replace(request, sampling=sampling), True

    def offer(self, request: Request, emissions: Sequence[Emission], *, busy: bool) -> None:
        """An answer that was drawn and has ended."""
        self._shadow.offer(request.prompt, emissions, busy=busy)

    def next(self, number: int) -> Request | None:
        """What is to run, under this number, if there is anything."""
        if len(self._running) >= _MOST_RUNNING or (suspect := self._shadow.pop()) is None:
            return None
        self._running[number] = suspect
        return Request(suspect.tokens, _ONE_TOKEN, self._full, prompt_logprobs=1)

    def hear(self, number: int, said: Emission | Failure | Scores) -> bool:
        """What the engine says; whether it is of an answer that is judged."""
        if (suspect := self._running.get(number)) is None:
            return False
        if isinstance(said, Scores):
            self._told(*self._shadow.judge(suspect, said.logprobs))
            return True
        if isinstance(said, Failure):
            self._shadow.drop()
        del self._running[number]
        return True


_ONE_TOKEN = SamplingParams(max_new_tokens=1)
