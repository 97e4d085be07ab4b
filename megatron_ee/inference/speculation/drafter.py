"""Drafts tokens of sequences, round after round, with the layers up to an exit.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.depth_walk import Arrival, DepthWalk
from megatron_ee.inference.sampling import NO_TOKEN, Row, propose
from megatron_ee.inference.sequences import DecodingSequence


class Drafter:
    def __init__(self, walk: DepthWalk) -> None:
        self._walk = walk

    def draft(self, sequences: Mapping[int, DecodingSequence]) -> None:
        """Draft in those that speculate and have their prompt behind them, each as far as it means to. What is drafted
        waits at its exit; the last token of a draft that has its full length has not entered the model yet."""
        drafting = {slot: of for slot, of in sequences.items() if of.begin_draft()}
        while drafting:
            for arrival, slots in self._to_exits(drafting):
                _extend(arrival.ask(slots), [drafting[slot] for slot in slots])
            drafting = {slot: of for slot, of in drafting.items() if of.goes_on_drafting}

    def _to_exits(self, drafting: Mapping[int, DecodingSequence]) -> Iterator[tuple[Arrival, list[int]]]:
        """The newest token of each sequence comes to the exit that drafts, those together that have the same."""
        for start, stop in pairwise((0, *sorted({_layer(of) for of in drafting.values()}))):
            going = {slot: of for slot, of in drafting.items() if _layer(of) >= stop}
            if start == 0:
                arrival = self._walk.enter({slot: of.take() for slot, of in going.items()}, stop)
                self._walk.work.drafts += 1
                self._walk.work.drafted += len(going)
            else:
                arrival = self._walk.advance(dict.fromkeys(going), start, stop)
            yield arrival, [slot for slot, of in going.items() if _layer(of) == stop]


def _layer(sequence: DecodingSequence) -> int:
    assert sequence.draft is not None
    return sequence.draft.layer


def _extend(asked: AskedExit, sequences: Sequence[DecodingSequence]) -> None:
    """One more token of each draft, or its end."""
    drafts = [of.draft for of in sequences if of.draft is not None]
    tokens, probabilities = propose(
        asked.logits, [Row(of.draws, tuple(draft.tokens)) for of, draft in zip(sequences, drafts, strict=True)]
    )
    sure = _sure(asked.logits, [of.request.exit.draft_threshold for of in sequences])
    for row, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
        if sequence.wants_passed:
            draft.passed.append(asked.logits[row])
        if tokens[row] == NO_TOKEN or not sure[row]:
            draft.is_over = True
        else:
            sequence.extend_draft(tokens[row], probabilities[row])


def _sure(logits_NV: torch.Tensor, thresholds: Sequence[float]) -> list[bool]:
    if not any(thresholds):
        return [True] * len(thresholds)
    peaks = logits_NV.softmax(-1, dtype=torch.float32).amax(-1).tolist()
    return [peak >= threshold for peak, threshold in zip(peaks, thresholds, strict=True)]
