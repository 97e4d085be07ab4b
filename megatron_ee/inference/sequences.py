"""One request on its way through a batch."""

from dataclasses import dataclass, field

import torch

from megatron_ee.inference.exit_rule import ExitRule, Streak
from megatron_ee.inference.request import FinishReason, Request
from megatron_ee.inference.sampling import Draws


@dataclass(slots=True)
class DecodingSequence:
    """
    Attributes:
        stops: the exits at which its rows are looked at, ascending.
        limit: most new tokens.
        unfed: tokens that the model has not seen: the prompt, later the newest token.
        streak: of the token that is on its way, over the exits that it was asked at.
        passed: exit -> logits_V that it passed there, kept where the request wants to know.
    """

    request: Request
    rule: ExitRule
    draws: Draws
    stops: tuple[int, ...]
    limit: int
    unfed: list[int]
    streak: Streak = field(default_factory=Streak)
    passed: dict[int, torch.Tensor] = field(default_factory=dict)
    finish: FinishReason | None = None

    def next_stop(self, start: int, num_layers: int) -> int:
        """Where rows that have run `start` layers are looked at next."""
        return next((stop for stop in self.stops if stop > start), num_layers)

    def take(self, count: int | None = None) -> list[int]:
        """Remove and return the first unfed tokens; all by default."""
        taken = self.unfed[:count]
        self.unfed = self.unfed[len(taken) :]
        return taken

    def say(self, token: int) -> None:
        """Its newest token, which may end it."""
        self.draws.answer.append(token)
        self.unfed, self.streak, self.passed = [token], Streak(), {}
        if token in self.request.stops:
            self.finish = "stop"
        elif len(self.draws.answer) == self.limit:
            self.finish = "length"
