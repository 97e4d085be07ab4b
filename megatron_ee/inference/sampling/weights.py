"""Probabilities as integers. Their sums are exact, so they are the same in any order of adding: on every device, with
any number of threads, whatever other rows there are."""

import torch

WHOLE = 2**62
"""The weight of probability 1; a little more than that, by rounding, still fits 64 bits."""


def weights_of(p: torch.Tensor) -> torch.Tensor:
    """int64, of fp32 or fp64; exact above 2**-10, and never off by more than 1 / WHOLE."""
    return (p * WHOLE).long()
