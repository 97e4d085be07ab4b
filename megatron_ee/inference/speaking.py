"""What an exit's logits, or full depth's, become: tokens, with what is told of them.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile

import torch

from megatron_ee.inference.answers import Said
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
        else _emission(
            sequence,
            choice,
            asked.layer,
            confidence,
            {**sequence.passed, asked.layer: logits_NV[row]} if sequence.wants_passed else None,
        )
        for row, (sequence, choice, confidence) in enumerate(zip(sequences, choices, confidences, strict=True))
    ]


def speak_of_drafts(asked: AskedExit, sequences: Sequence[DecodingSequence]) -> list[Said]:
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


def _say_all(sequence: DecodingSequence, choices: Sequence[Choice], asked: AskedExit, first_row: int) -> Said:
    draft = _draft_of(sequence)
    accepted = sum(
        1 for _ in takewhile(lambda pair: pair[0].token == pair[1], zip(choices, draft.tokens, strict=False))
    )
    emissions = []
    for place, choice in enumerate(choices):
        passed = None
        if sequence.wants_passed:
            passed = {draft.layer: draft.passed[place]} if place < len(draft.passed) else {}
            passed[asked.layer] = asked.logits[first_row + place]
        if place < accepted:
            emissions.append(_emission(sequence, choice, asked.layer, 1.0, passed, draft.layer))
        else:
            discarded = len(draft.tokens) - accepted
            emissions.append(_emission(sequence, choice, asked.layer, 1.0, passed, discarded=discarded))
    return Said(tuple(emissions), accepted)


def _emission(
    sequence: DecodingSequence,
    choice: Choice,
    layer: int,
    confidence: float,
    passed: Mapping[int, torch.Tensor] | None,
    draft_exit: int | None = None,
    discarded: int = 0,
) -> Emission:
    by_exit = None
    if passed is not None:
        by_exit = {exit_layer: _logprobs(of_V, choice, sequence.draws) for exit_layer, of_V in passed.items()}
    return Emission(choice.token, layer, confidence, choice.logprobs, by_exit, None, draft_exit, discarded)


def _logprobs(logits_V: torch.Tensor, choice: Choice, draws: Draws) -> Logprobs:
    (logprobs,) = logprobs_of(logits_V[None], [choice.token], draws.params.logprobs or 0)
    return logprobs


def _draft_of(sequence: DecodingSequence) -> Draft:
    assert sequence.draft is not None
    return sequence.draft
