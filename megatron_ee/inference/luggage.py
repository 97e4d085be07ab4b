"""What a sequence takes along to the next stage, beside its rows: what exits have said of the token on its way, or of
its draft, and where confidence compares hidden states, the one at the exit before.

Shapes: V vocabulary, H hidden size.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megatron_ee.inference.answers import Answers, Drafted, Said, Silence
from megatron_ee.inference.arrivals import Arrival
from megatron_ee.inference.scheduling.fronts import LaunchPlan
from megatron_ee.inference.sequences import DecodingSequence

Header = list[list[Any]]
"""slot, what it is, its number, its dtype, how many numbers it has."""


def has_luggage(sequence: DecodingSequence) -> bool:
    """Whether it may have any: a question that all processes answer alike."""
    rule = sequence.rule
    return sequence.draft is not None or sequence.wants_passed or len(rule.heard) > 0 or rule.compares_states


def with_states_before(
    arrival: Arrival, plan: LaunchPlan, sequences: Mapping[int, DecodingSequence], exits: Sequence[int]
) -> Arrival:
    """A stage that begins or ends between two exits gets, and passes on, the states at the first of them."""
    comparing = {slot: of for slot, of in sequences.items() if of.rule.compares_states}
    if not comparing:
        return arrival
    if plan.start not in (0, *exits):
        arrival = arrival._replace(
            previous={slot: of.previous_H for slot, of in comparing.items() if of.previous_H is not None}
        )
    states = {} if plan.stop in exits else arrival.states_before(comparing)
    for slot, of in comparing.items():
        of.previous_H = states.get(slot)
    return arrival


def pack(sequences: Mapping[int, DecodingSequence], answers: Answers) -> tuple[Header, torch.Tensor | None]:
    """As a list, and the bytes of all of it.

    Args:
        answers: which are not taken in yet: who has said something has no luggage any more.
    """
    found = [
        (slot, *item)
        for slot, of in sequences.items()
        if not isinstance(answer := answers.get(slot), Said | Silence)
        for item in (_newest_of_draft(of, answer) if isinstance(answer, Drafted) else _items(of))
    ]
    if not found:
        return [], None
    header = [[slot, what, number, _name(of.dtype), of.numel()] for slot, what, number, of in found]
    return header, torch.cat([of.contiguous().view(torch.uint8).flatten() for *_, of in found])


def size_of(header: Header) -> int:
    """In bytes."""
    return sum(count * _dtype(name).itemsize for *_, name, count in header)


def unpack(header: Header, packed: torch.Tensor, sequences: Mapping[int, DecodingSequence]) -> None:
    """Give sequences what has come with them."""
    sizes = [count * _dtype(name).itemsize for *_, name, count in header]
    for (slot, what, number, name, _), own in zip(header, torch.split(packed, sizes), strict=True):
        tensor, sequence = own.clone().view(_dtype(name)), sequences[slot]
        if what == "passed":
            sequence.passed[number] = tensor
        elif what == "previous":
            sequence.previous_H = tensor
        elif (draft := sequence.draft) is not None:
            _put(draft.probabilities if what == "probabilities" else draft.passed, number, tensor)


def _items(sequence: DecodingSequence) -> Iterable[tuple[str, int, torch.Tensor]]:
    yield from (("passed", layer, of) for layer, of in sequence.passed.items())
    if sequence.previous_H is not None:
        yield "previous", 0, sequence.previous_H
    if (draft := sequence.draft) is not None:
        yield from (("probabilities", number, of) for number, of in enumerate(draft.probabilities))
        yield from (("drafted", number, of) for number, of in enumerate(draft.passed))


def _newest_of_draft(sequence: DecodingSequence, answer: Drafted) -> Iterable[tuple[str, int, torch.Tensor]]:
    """Of a draft that waits behind the border that it is drafted before: earlier tokens' have gone before."""
    draft = sequence.draft
    assert draft is not None
    if answer.p_V is not None:
        yield "probabilities", len(draft.probabilities), answer.p_V
    if draft.passed:
        yield "drafted", len(draft.passed) - 1, draft.passed[-1]


def _put(of: list[torch.Tensor], number: int, tensor: torch.Tensor) -> None:
    """They come in order, and anew at each stage."""
    del of[number:]
    of.append(tensor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype), name
    return found
