"""Log-probabilities of prompts' tokens, by full depth's logits as they are, of rows that have come to the end.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from megatron_ee.inference.arrivals import Arrival
from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.request import Logprobs
from megatron_ee.inference.sampling import logprobs_of
from megatron_ee.inference.sequences import DecodingSequence

_MOST_LOGITS = 1 << 24
"""That are there at a time, where a row has no more: of a long prompt and a large vocabulary they would fill a GPU."""


class _Next(NamedTuple):
    """A row, and the token that comes after it in its prompt."""

    row: int
    slot: int
    token: int


def scores_of(arrival: Arrival, sequences: Mapping[int, DecodingSequence]) -> dict[int, tuple[Logprobs, ...] | None]:
    """Of each token that comes after a row in its prompt, by slot, with as many of the likeliest as its request wants.
    None: some of its rows' logits are no numbers.

    Args:
        sequences: that are scored, by slot; all rows that they have in the launch are of their prompts.
    """
    positions = {slot: of for slot, of in arrival.launch.rows if slot in sequences}
    asked = arrival.ask_last({slot: len(positions[slot]) for slot in sequences})
    tops = {slot: of.request.prompt_logprobs or 0 for slot, of in sequences.items()}
    found: dict[int, list[Logprobs]] = {slot: [] for slot in sequences}
    silent = set()
    most = max(1, _MOST_LOGITS // arrival.runner.vocab_size)
    following = [*_following(sequences, positions)]
    for start in range(0, len(following), most):
        part = following[start : start + most]
        for of, logprobs in zip(part, _logprobs(asked, part, max(tops[of.slot] for of in part)), strict=True):
            if logprobs is None:
                silent.add(of.slot)
            else:
                found[of.slot].append(_cut(logprobs, tops[of.slot]))
    return {slot: None if slot in silent else tuple(own) for slot, own in found.items()}


def _following(sequences: Mapping[int, DecodingSequence], positions: Mapping[int, range]) -> Iterator[_Next]:
    """Rows are numbered sequence after sequence; nothing comes after the last one of a prompt."""
    first = 0
    for slot, of in sequences.items():
        start, stop = positions[slot].start, positions[slot].stop
        yield from (_Next(first + n, slot, token) for n, token in enumerate(of.request.prompt[start + 1 : stop + 1]))
        first += stop - start


def _logprobs(asked: AskedExit, following: Sequence[_Next], top: int) -> list[Logprobs | None]:
    """None: a row's logits are NaN, or infinite, as no token could be chosen by them."""
    logits_NV = asked.of([of.row for of in following]).logits
    are_numbers = logits_NV.amax(-1).isfinite().tolist()
    found = logprobs_of(logits_NV, [of.token for of in following], top)
    return [of if is_number else None for of, is_number in zip(found, are_numbers, strict=True)]


def _cut(logprobs: Logprobs, top: int) -> Logprobs:
    if len(logprobs.top) <= top:
        return logprobs
    return Logprobs(logprobs.token, dict(islice(logprobs.top.items(), top)))
