"""What an exit, or full depth, answers for a sequence: plain data, and what it does to the sequence. Whoever has the
rows computes an answer; whoever follows the sequence, in this process or another, takes it in.

Shapes: V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megatron_ee.inference.request import Emission, Logprobs, Scores
from megatron_ee.inference.sequences import DecodingSequence


@dataclass(frozen=True, slots=True)
class Passed:
    """Its rows go on.

    Attributes:
        choice: the exit's likeliest token.
    """

    choice: int


@dataclass(frozen=True, slots=True)
class Drafted:
    """
    Attributes:
        token: the next of its draft; None: the draft is over without it.
        p_V: that it was drawn from, if it was; known where the exit is.
    """

    token: int | None
    p_V: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """
    Attributes:
        emissions: one or more tokens, in order, not yet with `finish`; none only where a draft is verified.
        accepted: drafted tokens that full depth accepted; None: nothing was drafted.
    """

    emissions: tuple[Emission, ...]
    accepted: int | None = None


@dataclass(frozen=True, slots=True)
class Silence:
    """There is no token to choose, and never will be."""


@dataclass(frozen=True, slots=True)
class Scored:
    """
    Attributes:
        logprobs: of the next tokens of its prompt.
        then: what is said after the last of them; None: more of it follows.
    """

    logprobs: tuple[Logprobs, ...]
    then: "Answer | None" = None


Answer = Passed | Drafted | Said | Silence | Scored
Answers = Mapping[int, Answer]
"""By slot."""
Spoken = list[tuple[int, Emission | Scores | None]]
"""By slot, a token or several, in order, before the first one a prompt's scores; None: there is none to choose."""


def take_in(sequence: DecodingSequence, answer: Answer) -> list[Emission | Scores | None]:
    """Change a sequence by an answer. Returns what is said with it."""
    match answer:
        case Passed(choice):
            sequence.streak.see(choice)
        case Drafted(None):
            sequence.end_drafting()
        case Drafted(token, p_V) if token is not None:
            sequence.extend_draft(token, p_V)
        case Silence():
            sequence.is_silent = True
            return [None]
        case Said(emissions, accepted):
            if accepted is not None:
                sequence.end_draft(accepted=accepted)
            return [_say(sequence, emission) for emission in emissions]
        case Scored(logprobs, then):
            sequence.score(logprobs)
            return [] if then is None else [Scores(sequence.end_scoring()), *take_in(sequence, then)]
    return []


def _say(sequence: DecodingSequence, emission: Emission) -> Emission:
    sequence.say(emission.token)
    return emission if sequence.finish is None else replace(emission, finish=sequence.finish)
