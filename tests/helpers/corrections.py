"""SLED and DoLa by their formulas, token by token, with so many digits that 1 - p is right for the surest p."""

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext

import torch

from megatron_ee.config import DolaParams, SledParams

Numbers = Sequence[Decimal]


def naive_sled(final_V: torch.Tensor, early: Sequence[torch.Tensor], params: SledParams) -> list[float]:
    """One row's evolved logits; every exit has a vector p - e_i for every token in the race."""
    with localcontext(prec=_digits(final_V, *early)):
        z = _numbers(final_V)
        border = sorted(z, reverse=True)[min(params.top_k, len(z)) - 1]
        race = [token for token, logit in enumerate(z) if logit >= border]
        m = [Decimal(0)] * len(z)
        for exit_V in early:
            z_n = _numbers(exit_V)
            p, v = _softmax(z_n), [early - final for early, final in zip(z_n, z, strict=True)]
            for token in race:
                gradient = [p_j - (j == token) for j, p_j in enumerate(p)]
                m[token] += max(_cosine(v, gradient), Decimal(0)) ** 2
        if total := sum(m):
            for step in range(params.steps):
                rate = Decimal(params.alpha) * (1 - Decimal(step) / params.steps)
                p = _softmax(z)
                z = [logit - rate * (p_i - m_i / total) for logit, p_i, m_i in zip(z, p, m, strict=True)]
        return [float(z[token]) if token in race else params.lower_bound for token in range(len(z))]


def naive_divergence(final_V: torch.Tensor, exit_V: torch.Tensor) -> float:
    """Jensen-Shannon's, of the two distributions, in nats."""
    with localcontext(prec=_digits(final_V, exit_V)):
        p, q = _softmax(_numbers(final_V)), _softmax(_numbers(exit_V))
        m = [(p_i + q_i) / 2 for p_i, q_i in zip(p, q, strict=True)]
        return float((_kl(p, m) + _kl(q, m)) / 2)


def naive_dola(final_V: torch.Tensor, early: Sequence[torch.Tensor], params: DolaParams) -> list[float]:
    """One row's contrasted logits."""
    divergences = [naive_divergence(final_V, exit_V) for exit_V in early]
    chosen_V = early[divergences.index(max(divergences))]
    with localcontext(prec=_digits(final_V, chosen_V)):
        p, q = _softmax(_numbers(final_V)), _softmax(_numbers(chosen_V))
        least = Decimal(params.relative_top) * max(p)
        contrasts = [float(p_i.ln() - q_i.ln()) for p_i, q_i in zip(p, q, strict=True)]
        return [contrast if p_i >= least else params.lower_bound for contrast, p_i in zip(contrasts, p, strict=True)]


def _digits(*rows: torch.Tensor) -> int:
    """Twenty beyond those that the least probability has behind the point."""
    return 20 + int(max(logits_V.max() - logits_V.min() for logits_V in rows) / math.log(10))


def _numbers(logits_V: torch.Tensor) -> list[Decimal]:
    return [Decimal(logit) for logit in logits_V.tolist()]


def _softmax(z: Numbers) -> list[Decimal]:
    peak = max(z)
    odds = [(logit - peak).exp() for logit in z]
    total = sum(odds)
    return [odd / total for odd in odds]


def _cosine(a: Numbers, b: Numbers) -> Decimal:
    lengths = sum(x * x for x in a) * sum(y * y for y in b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / Decimal(lengths).sqrt() if lengths else Decimal(0)


def _kl(p: Numbers, m: Numbers) -> Decimal:
    return Decimal(sum(p_i * (p_i / m_i).ln() for p_i, m_i in zip(p, m, strict=True)))
