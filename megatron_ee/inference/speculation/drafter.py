"""What an exit drafts.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Sequence

import torch

from megatron_ee.inference.answers import Drafted
from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.sampling import NO_TOKEN, Row, propose
from megatron_ee.inference.sequences import DecodingSequence


def draft(asked: AskedExit, sequences: Sequence[DecodingSequence]) -> list[Drafted]:
    """One more token of each sequence's draft, or its end.

    Args:
        asked: the exit that drafts, at the newest token of each.
    """
    drafts = [of.draft for of in sequences if of.draft is not None]
    tokens, probabilities = propose(
        asked.logits, [Row(of.draws, tuple(draft.tokens)) for of, draft in zip(sequences, drafts, strict=True)]
    )
    sure = _sure(asked.logits, [of.request.exit.draft_threshold for of in sequences])
    for row, (sequence, own) in enumerate(zip(sequences, drafts, strict=True)):
        if sequence.wants_passed:
            own.passed.append(asked.logits[row])
    return [
        Drafted(None) if token == NO_TOKEN or not is_sure else Drafted(token, p_V)
        for token, p_V, is_sure in zip(tokens, probabilities, sure, strict=True)
    ]


def _sure(logits_NV: torch.Tensor, thresholds: Sequence[float]) -> list[bool]:
    if not any(thresholds):
        return [True] * len(thresholds)
    peaks = logits_NV.softmax(-1, dtype=torch.float32).amax(-1).tolist()
    return [peak >= threshold for peak, threshold in zip(peaks, thresholds, strict=True)]
