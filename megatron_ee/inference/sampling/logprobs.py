"""Log-probabilities by the logits as they are.

Shapes: N rows, V vocabulary, K the likeliest tokens.
"""

from collections.abc import Sequence

import torch

from megatron_ee.inference.request import Logprobs


def logprobs_of(logits_NV: torch.Tensor, tokens: Sequence[int], top: int) -> list[Logprobs]:
    """Of each row's token and of the `top` likeliest ones (of equals those with the lowest ids), natural logarithms in
    fp64 where the logits are, else in fp32."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    logprobs_NV = logits_NV.log_softmax(-1, dtype=dtype)
    chosen_N1 = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])
    if top == 0:
        return [Logprobs(logprob, {}) for logprob in chosen_N1[:, 0].tolist()]
    likeliest = _likeliest(logits_NV, logprobs_NV, min(top, logits_NV.shape[-1]))
    return [Logprobs(logprob, of_row) for logprob, of_row in zip(chosen_N1[:, 0].tolist(), likeliest, strict=True)]


def _likeliest(logits_NV: torch.Tensor, logprobs_NV: torch.Tensor, top: int) -> list[dict[int, float]]:
    """By the logits, which may differ where their log-probabilities are rounded to the same."""
    border_N1 = logits_NV.topk(top).values[:, -1:]
    places = (logits_NV >= border_N1).nonzero()  # by row and token: of equals at the border there may be too many
    found = torch.stack((*places.T.double(), logits_NV[*places.T].double(), logprobs_NV[*places.T].double())).tolist()
    of_rows: list[list[tuple[float, int, float]]] = [[] for _ in logits_NV]
    for row, token, logit, logprob in zip(*found, strict=True):
        of_rows[int(row)].append((-logit, int(token), logprob))
    return [{token: logprob for _, token, logprob in sorted(row)[:top]} for row in of_rows]
