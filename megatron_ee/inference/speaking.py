"""What an exit's logits, or full depth's, become: tokens, with what is told of them.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate, takewhile

import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.corrections import corrected
from megatron_ee.inference.request import Emission, Logprobs
from megatron_ee.inference.sampling import Choice, Drafted, Draws, choose, logprobs_of, verify
from megatron_ee.inference.sequences import DecodingSequence
from megatron_ee.inference.speculation.draft import Draft


def speak(
    asked: AskedExit, sequences: Sequence[DecodingSequence], confidences: Sequence[float]
) -> list[Emission | None]:
    """A token of each sequence; where exits are heard, of the logits that they correct. None: there is none to choose.

    Args:
        asked: a row of each.
    """
    logits_NV = _corrected(asked, sequences)
    choices = choose(logits_NV, [sequence.draws for sequence in sequences])
    return [
        None
        if choice is None
        else _say(sequence, choice, asked.layer, confidence, logits_NV[row] if sequence.wants_passed else None)
        for row, (sequence, choice, confidence) in enumerate(zip(sequences, choices, confidences, strict=True))
    ]


def speak_of_drafts(asked: AskedExit, sequences: Sequence[DecodingSequence]) -> list[list[Emission]]:
    """The tokens of each sequence's draft that full depth accepts, and the one that it adds; none at all where it says
    nothing.

    Args:
        asked: the rows of each draft, one after the other.
    """
    drafts = [_draft_of(sequence) for sequence in sequences]
    first_rows = accumulate((draft.num_rows for draft in drafts), initial=0)
    choices = verify(
        asked.logits,
        [
            Drafted(of.draws, draft.tokens, draft.probabilities, draft.num_rows)
            for of, draft in zip(sequences, drafts, strict=True)
        ],
    )
    return [
        _say_all(sequence, own, asked, first)
        for sequence, own, first in zip(sequences, choices, first_rows, strict=False)
    ]


def _corrected(asked: AskedExit, sequences: Sequence[DecodingSequence]) -> torch.Tensor:
    if not any(sequence.rule.heard for sequence in sequences):
        return asked.logits
    return corrected(asked.logits, [(of.request.exit, of.passed) if of.rule.heard else None for of in sequences])


def _say_all(sequence: DecodingSequence, choices: Sequence[Choice], asked: AskedExit, first_row: int) -> list[Emission]:
    draft = _draft_of(sequence)
    accepted = sum(
        1 for _ in takewhile(lambda pair: pair[0].token == pair[1], zip(choices, draft.tokens, strict=False))
    )
    sequence.end_draft(accepted=accepted)
    emissions = []
    for place, choice in enumerate(choices):
        logits_V = asked.logits[first_row + place] if sequence.wants_passed else None
        if place < len(draft.passed):
            sequence.passed[draft.layer] = draft.passed[place]
        if place < accepted:
            emissions.append(_say(sequence, choice, asked.layer, 1.0, logits_V, draft.layer))
        else:
            discarded = len(draft.tokens) - accepted
            emissions.append(_say(sequence, choice, asked.layer, 1.0, logits_V, discarded=discarded))
    return emissions


def _say(
    sequence: DecodingSequence,
    choice: Choice,
    layer: int,
    confidence: float,
    logits_V: torch.Tensor | None,
    draft_exit: int | None = None,
    discarded: int = 0,
) -> Emission:
    by_exit = None
    if logits_V is not None:
        passed = {**sequence.passed, layer: logits_V}
        by_exit = {exit_layer: _logprobs(of_V, choice, sequence.draws) for exit_layer, of_V in passed.items()}
    sequence.say(choice.token)
    return Emission(choice.token, layer, confidence, choice.logprobs, by_exit, sequence.finish, draft_exit, discarded)


def _logprobs(logits_V: torch.Tensor, choice: Choice, draws: Draws) -> Logprobs:
    (logprobs,) = logprobs_of(logits_V[None], [choice.token], draws.params.logprobs or 0)
    return logprobs


def _draft_of(sequence: DecodingSequence) -> Draft:
    assert sequence.draft is not None
    return sequence.draft
