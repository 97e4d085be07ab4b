"""One request on its way through a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_ee.inference.exit_rule import ExitRule, Streak
from megatron_ee.inference.request import FinishReason, Logprobs, Request
from megatron_ee.inference.sampling import Draws
from megatron_ee.inference.speculation.draft import Draft
from megatron_ee.inference.speculation.pace import Pace


@dataclass(slots=True)
class DecodingSequence:
    """
    Shapes: H hidden size.

    Attributes:
        stops: the exits at which its rows are looked at, ascending.
        limit: most new tokens.
        unfed: tokens that the model has not seen: the prompt, later the newest token.
        pace: of one that speculates.
        streak: of the token that is on its way, over the exits that it was asked at.
        passed: exit -> logits_V of the token that is on its way, kept where somebody wants to know.
        previous_H: where a stage ends between two exits, the state at the first of them, if it is compared later.
        draft: of the tokens that are on their way, where it drafts.
        at: layers that its rows on their way have run; 0 where tokens enter next.
        since: the launch that brought them there.
        is_silent: there is no token to choose for it, and never will be.
        scores: of its prompt, as far as that has come to full depth; None: nobody wants them, or they have been said.
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
    previous_H: torch.Tensor | None = None
    draft: Draft | None = None
    at: int = 0
    since: int = 0
    finish: FinishReason | None = None
    is_silent: bool = False
    scores: list[Logprobs] | None = None

    def next_stop(self, start: int, num_layers: int) -> int:
        """Where rows that have run `start` layers are looked at next."""
        stops = self.stops if self.draft is None else (self.draft.layer,)
        if self.scores is not None:  # no exit lets out a prompt that is scored
            stops = self.rule.heard
        return next((stop for stop in stops if stop > start), num_layers)

    @property
    def wants_passed(self) -> bool:
        """Whether it is told what every exit says of its tokens."""
        return self.request.sampling.exit_logprobs

    def come_to(self, layer: int, launch: int) -> None:
        """A launch has taken its rows there."""
        self.at, self.since = layer, launch

    @property
    def joins_at(self) -> int:
        """The exit where all of its draft waits, with nothing of it still to enter; 0: there is none."""
        return self.draft.layer if self.draft is not None and self.draft.joins else 0

    @property
    def num_positions(self) -> int:
        """That its tokens have in the model: all but the newest token's."""
        return len(self.request.prompt) + len(self.draws.answer) - 1

    @property
    def shared_prompt(self) -> tuple[int, ...]:
        """Whose beginning it may take over as others had it before; what is scored has to run here."""
        return self.request.prompt if self.scores is None else ()

    @property
    def next_positions(self) -> int:
        """Positions that there have to be before its next token: those of a whole draft, if it drafts."""
        drafted = 0 if self.draft is None else self.draft.length
        return len(self.request.prompt) + len(self.draws.answer) + drafted

    @property
    def most_positions(self) -> int:
        """Positions that it may ever have."""
        return len(self.request.prompt) + self.limit - 1

    @property
    def may_start_over(self) -> bool:
        """Whether all that the model knows of it would be the same again: nothing of it is an approximation by what
        happened to it, and nothing is under way."""
        is_between_tokens = self.at == 0 and (self.draft is None or not self.draft.tokens)
        return is_between_tokens and self.rule.kv_policy != "propagate"

    def start_over(self) -> None:
        """Its prompt, and all that it has said, are to enter the model again."""
        assert self.may_start_over
        self.unfed = [*self.request.prompt, *self.draws.answer]
        if self.scores is not None:
            self.scores = []

    def score(self, logprobs: Sequence[Logprobs]) -> None:
        """More of its prompt has come to full depth."""
        assert self.scores is not None
        self.scores += logprobs

    def end_scoring(self) -> tuple[Logprobs, ...]:
        """All of its prompt's, which are said now."""
        assert self.scores is not None and len(self.scores) == len(self.request.prompt) - 1, "a row was not scored"
        scores, self.scores = tuple(self.scores), None
        return scores

    def begin_draft(self) -> None:
        """Before its next token, if it speculates: never more than what may be said before full depth adds a token."""
        if self.pace is None:
            return
        layer, length = self.pace.next(self.limit - len(self.draws.answer) - 1)
        if length:
            self.draft = Draft(layer, length)
        else:
            self.pace.see(layer, drafted=0, accepted=0)

    @property
    def is_drafting(self) -> bool:
        """Whether its rows are on their way to the exit that drafts more."""
        return self.draft is not None and not self.draft.is_over

    def drafts_at(self, layer: int) -> bool:
        return self.is_drafting and self.draft is not None and self.draft.layer == layer

    def extend_draft(self, token: int, p_V: torch.Tensor | None) -> None:
        """Its next drafted token, and what it was drawn from, if it was. A stop token, after which nothing can come,
        need not enter the model."""
        draft = self.draft
        assert draft is not None
        draft.tokens.append(token)
        if p_V is not None:
            draft.probabilities.append(p_V)
        draft.stops = draft.joins = token in self.request.stops
        draft.is_over = draft.stops or len(draft.tokens) == draft.length
        if not draft.stops:
            self.unfed, self.at = [token], 0

    def end_drafting(self) -> None:
        """The exit has nothing more to draft; all of it waits there."""
        assert self.draft is not None
        self.draft.is_over = self.draft.joins = True

    def end_draft(self, *, accepted: int) -> None:
        """Full depth has answered; what it has to say comes next, or the newest token is run again."""
        assert self.pace is not None and self.draft is not None
        self.pace.see(self.draft.layer, drafted=len(self.draft.tokens), accepted=accepted)
        self.draft, self.unfed, self.at = None, self.draws.answer[-1:], 0

    def take(self, count: int | None = None) -> list[int]:
        """Remove and return the first unfed tokens; all by default."""
        taken = self.unfed[:count]
        self.unfed = self.unfed[len(taken) :]
        return taken

    def say(self, token: int) -> None:
        """Its newest token, which may end it."""
        self.draws.answer.append(token)
        self.unfed, self.at, self.streak, self.passed, self.previous_H = [token], 0, Streak(), {}, None
        if token in self.request.stops:
            self.finish = "stop"
        elif len(self.draws.answer) == self.limit:
            self.finish = "length"
