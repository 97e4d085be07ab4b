"""What a request changes of its logits, whatever it then does with them: bias, penalties, a ban on stop tokens.

Each step touches the entries that it changes and no others, of all rows at once.

Shapes: N rows, V vocabulary, T entries of all rows.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from megatron_ee.inference.sampling.draws import Row

Numbers = npt.NDArray[np.float64]


def adjusted(logits_NV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """A changed copy, in fp64 where the logits are, else in fp32."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    changed_NV = torch.empty(logits_NV.shape, dtype=dtype, device=logits_NV.device).copy_(logits_NV)
    _add_bias(changed_NV, rows)
    _penalise(changed_NV, rows)
    _ban_stops(changed_NV, rows)
    return changed_NV


def _add_bias(logits_NV: torch.Tensor, rows: Sequence[Row]) -> None:
    biases = [(number, *row.draws.bias) for number, row in enumerate(rows) if row.draws.params.logit_bias]
    if biases:
        index_T, bias_T = _entries(logits_NV, biases)
        logits_NV.view(-1)[index_T] += bias_T


def _penalise(logits_NV: torch.Tensor, rows: Sequence[Row]) -> None:
    """The repetition penalty of CTRL (arXiv 1909.05858), over prompt and answer, then those of the answer alone."""
    penalties = [(number, *_penalties(row)) for number, row in enumerate(rows) if row.draws.has_penalties]
    if penalties:
        index_T, factor_T, penalty_T = _entries(logits_NV, penalties)
        logits_T = logits_NV.view(-1)[index_T]
        logits_T = torch.where(logits_T > 0, logits_T / factor_T, logits_T * factor_T)
        logits_NV.view(-1)[index_T] = logits_T - penalty_T


def _ban_stops(logits_NV: torch.Tensor, rows: Sequence[Row]) -> None:
    bans = [(number, row.draws.stops) for number, row in enumerate(rows) if row.draws.bans_stops(row.drafted)]
    if bans:
        in_vocabulary = [(number, stops[stops < logits_NV.shape[-1]]) for number, stops in bans]
        (index_T,) = _entries(logits_NV, in_vocabulary)
        logits_NV.view(-1)[index_T] = -math.inf


def _penalties(row: Row) -> tuple[Numbers, Numbers, Numbers]:
    """Tokens, what divides or multiplies the logit of each, and what is then taken from it."""
    params = row.draws.params
    tokens_T, counts_T = row.draws.counted(row.drafted)
    penalty_T = params.frequency_penalty * counts_T + params.presence_penalty * (counts_T > 0)
    return tokens_T.astype(np.float64), np.full(len(tokens_T), params.repetition_penalty), penalty_T


def _entries(logits_NV: torch.Tensor, of_rows: Sequence[tuple]) -> list[torch.Tensor]:
    """Places in the flattened logits, and the values that belong to each, in one copy to the device.

    Args:
        of_rows: the number of a row, its tokens, and values for each of them.
    """
    vocab_size = logits_NV.shape[-1]
    columns = [(tokens + number * vocab_size, *values) for number, tokens, *values in of_rows]
    numbers = [np.concatenate(column) for column in zip(*columns, strict=True)]
    index_T, *values = torch.from_numpy(np.stack(numbers).astype(np.float64)).to(logits_NV.device)
    return [index_T.long(), *(values_T.to(logits_NV.dtype) for values_T in values)]
