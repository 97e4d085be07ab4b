"""One request on its way through a batch."""

from dataclasses import dataclass, field

import torch

from megatron_ee.inference.exit_rule import ExitRule, Streak
from megatron_ee.inference.request import FinishReason, Request
from megatron_ee.inference.sampling import Draws
from megatron_ee.inference.speculation.draft import Draft
from megatron_ee.inference.speculation.pace import Pace


@dataclass(slots=True)
class DecodingSequence:
    """
    Attributes:
        stops: the exits at which its rows are looked at, ascending.
        limit: most new tokens.
        unfed: tokens that the model has not seen: the prompt, later the newest token.
        pace: of one that speculates.
        streak: of the token that is on its way, over the exits that it was asked at.
        passed: exit -> logits_V of the token that is on its way, kept where somebody wants to know.
        draft: of the tokens that are on their way, where it drafts.
    """

    request: Request
    rule: ExitRule
    draws: Draws
    stops: tuple[int, ...]
    limit: int
    unfed: list[int]
    pace: Pace | None = None
    streak: Streak = field(default_factory=Streak)
    passed: dict[int, torch.Tensor] = field(default_factory=dict)
    draft: Draft | None = None
    finish: FinishReason | None = None

    def next_stop(self, start: int, num_layers: int) -> int:
        """Where rows that have run `start` layers are looked at next."""
        stops = self.stops if self.draft is None else (self.draft.layer,)
        return next((stop for stop in stops if stop > start), num_layers)

    @property
    def wants_passed(self) -> bool:
        """Whether it is told what every exit says of its tokens."""
        return self.request.sampling.exit_logprobs

    @property
    def joins_at(self) -> int:
        """The depth from which it takes part: where its draft waits, if no token of it is still to enter."""
        return 0 if self.unfed or self.draft is None else self.draft.layer

    @property
    def num_positions(self) -> int:
        """That its tokens have in the model: all but the newest token's."""
        return len(self.request.prompt) + len(self.draws.answer) - 1

    def begin_draft(self) -> bool:
        """Whether it drafts now: never more than what may still be said before full depth adds a token."""
        if self.pace is None or not self.draws.answer:
            return False
        layer, length = self.pace.next(self.limit - len(self.draws.answer) - 1)
        if length == 0:
            self.pace.see(layer, drafted=0, accepted=0)
            return False
        self.draft = Draft(layer, length)
        return True

    @property
    def goes_on_drafting(self) -> bool:
        return self.draft is not None and not self.draft.is_over

    def extend_draft(self, token: int, p_V: torch.Tensor | None) -> None:
        """Its next drafted token, and what it was drawn from, if it was. A stop token, after which nothing can come,
        need not enter the model."""
        draft = self.draft
        assert draft is not None
        draft.tokens.append(token)
        if p_V is not None:
            draft.probabilities.append(p_V)
        draft.stops = token in self.request.stops
        draft.is_over = draft.stops or len(draft.tokens) == draft.length
        self.unfed = [] if draft.stops else [token]

    def end_draft(self, *, accepted: int) -> None:
        """Full depth has answered; what it has to say comes next, or the newest token is run again."""
        assert self.pace is not None and self.draft is not None
        self.pace.see(self.draft.layer, drafted=len(self.draft.tokens), accepted=accepted)
        self.draft, self.unfed = None, self.draws.answer[-1:]

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
