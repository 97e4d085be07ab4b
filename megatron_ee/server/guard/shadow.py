"""Shadow sampling: a share of the answers is judged by full depth, too, so that agreement is measured on what is really
asked.

A judged answer is run once more as a prompt: the prompt and the answer, with the log-probabilities of all its tokens at
full depth. That is done where the server has nothing else to do, and whoever asked never waits for it. Which answers
are judged is drawn by random numbers of the server, so that no client can foresee it, or have a say.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random, SystemRandom

from megatron_ee.config import ExitParams
from megatron_ee.inference.request import Emission, Logprobs

CLIENT = "shadow"
"""The name under which they run; no client has it."""


@dataclass(frozen=True, slots=True, eq=False)
class Suspect:
    """An answer that is to be judged.

    Attributes:
        tokens: prompt and answer, to be scored at full depth, with the likeliest token beside each.
        choices: what the exit itself thought likeliest, of each token that left early, by its place among `tokens`.
    """

    tokens: tuple[int, ...]
    choices: Mapping[int, int]


class Shadow:
    """
    Args:
        share: of the answers that may leave early.
        num_layers: tokens that ran fewer left early.
        longest: tokens that can be scored; None: any number. Of longer answers the beginning is judged.
        most: answers that may wait or run at a time; others are dropped.
        random: None: such as nobody can foresee.

    Attributes:
        drawn: answers that were to be judged.
        dropped: those of them for which there was no time, or nothing to judge.
        judged: those that full depth has judged.
    """

    def __init__(
        self,
        share: float,
        *,
        num_layers: int,
        longest: int | None = None,
        most: int = 4,
        random: Random | None = None,
    ) -> None:
        self._share, self._num_layers, self._longest, self._most = share, num_layers, longest, most
        self._random = random or SystemRandom()
        self._waiting: deque[Suspect] = deque()
        self._running = 0
        self.drawn = self.dropped = self.judged = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def draw(self, exit: ExitParams, exits: Sequence[int]) -> bool:
        """Whether a new request's answer is to be judged. It has to run with `logprobs` of 1 at least then, and comes
        back by `offer`.

        Args:
            exits: the model's; who may leave at none of them is not judged.
        """
        chosen = self._share > 0 and bool(exit.may_fire(exits)) and self._random.random() < self._share
        self.drawn += chosen
        return chosen

    def offer(self, prompt: Sequence[int], emissions: Sequence[Emission], *, busy: bool) -> bool:
        """An answer that was drawn and has ended.

        Args:
            busy: others wait, so that there would be no time for it.

        Returns:
            Whether it waits now.
        """
        choices = self._choices(len(prompt), emissions)
        if busy or not choices or len(self._waiting) + self._running >= self._most:
            self.dropped += 1
            return False
        tokens = (*prompt, *(emission.token for emission in emissions))[: self._longest]
        self._waiting.append(Suspect(tokens, choices))
        return True

    def pop(self) -> Suspect | None:
        """The next one, when the server has nothing else to do; `judge` or `drop` ends it."""
        if not self._waiting:
            return None
        self._running += 1
        return self._waiting.popleft()

    def judge(self, suspect: Suspect, scores: Sequence[Logprobs]) -> tuple[int, int]:
        """How many of the tokens that left early full depth would have chosen too, and of how many.

        Args:
            scores: of the suspect's tokens, from the second on, with the likeliest one each.
        """
        self._running -= 1
        self.judged += 1
        agreeing = sum(_likeliest(scores[place - 1]) == choice for place, choice in suspect.choices.items())
        return agreeing, len(suspect.choices)

    def drop(self) -> None:
        """One that runs has failed, or the server has something else to do."""
        self._running -= 1
        self.dropped += 1

    def _choices(self, num_prompt: int, emissions: Sequence[Emission]) -> dict[int, int]:
        return {
            place: _likeliest(emission.logprobs)
            for place, emission in enumerate(emissions, num_prompt)
            if emission.exit_layer < self._num_layers
            and emission.logprobs is not None
            and emission.logprobs.top
            and (self._longest is None or place < self._longest)
        }


def _likeliest(logprobs: Logprobs) -> int:
    return next(iter(logprobs.top))
