"""How confident an exit is: in [0, 1], row by row, from its logits as they are or from hidden states."""

from collections.abc import Callable, Mapping

import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.measures.gate import gate
from megatron_ee.inference.measures.max_probability import max_probability

Measure = Callable[[AskedExit], torch.Tensor]
"""Confidence [N] of each of an exit's rows: in [0, 1], floating, or NaN, which never fires. No row's depends on
another's, nor on how a request samples."""

MEASURES: Mapping[str, Measure] = {"max_probability": max_probability, "gate": gate}


def measure_of_logits(measure: Callable[[torch.Tensor], torch.Tensor]) -> Measure:
    """A plug-in's measure: logits_NV -> confidence [N]."""
    return lambda asked: measure(asked.logits_NV)
