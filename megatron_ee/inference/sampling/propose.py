"""Tokens for drafts: chosen as full depth would, from what an exit says.

Shapes: N rows, M those of sampled requests, V vocabulary.
"""

from collections.abc import Sequence

import torch

from megatron_ee.inference.sampling.adjust import adjusted
from megatron_ee.inference.sampling.distribution import sampled_probabilities
from megatron_ee.inference.sampling.draw import drawn, likeliest
from megatron_ee.inference.sampling.draws import Row
from megatron_ee.inference.sampling.rows import pick


def propose(logits_NV: torch.Tensor, rows: Sequence[Row]) -> tuple[list[int], list[torch.Tensor | None]]:
    """A token of each row, NO_TOKEN where there is none, and p_V that it was drawn from, of sampled requests."""
    assert len(logits_NV) == len(rows)
    sampled = [number for number, row in enumerate(rows) if not row.draws.is_greedy]
    changed = [
        number for number, row in enumerate(rows) if row.draws.is_greedy and row.draws.changes_logits(row.drafted)
    ]
    probabilities: list[torch.Tensor | None] = [None] * len(rows)
    if len(sampled) == len(rows):
        tokens_N = torch.empty(len(rows), dtype=torch.long, device=logits_NV.device)
    else:
        tokens_N = likeliest(logits_NV)
    if changed:
        tokens_N[changed] = likeliest(adjusted(pick(logits_NV, changed), [rows[number] for number in changed]))
    if sampled:
        of_sampled = [rows[number] for number in sampled]
        p_MV = sampled_probabilities(
            adjusted(pick(logits_NV, sampled), of_sampled), [of.draws.params for of in of_sampled]
        )
        u_M = torch.tensor([row.draws.uniform() for row in of_sampled], dtype=torch.float64)
        tokens_N[sampled] = drawn(p_MV, u_M)
        for number, p_V in zip(sampled, p_MV, strict=True):
            probabilities[number] = p_V
    return tokens_N.tolist(), probabilities
