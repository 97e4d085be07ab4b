"""From logits to a token."""

import torch


def sample(logits_V: torch.Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Greedy at temperature 0, else a draw from the softmax, among the `top_k` likeliest tokens where it is set."""
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.float().cpu() / temperature
    if 0 < top_k < scaled_V.numel():
        scaled_V = scaled_V.masked_fill(scaled_V < scaled_V.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(scaled_V.softmax(-1), 1, generator=generator))
