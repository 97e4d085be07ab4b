"""How confident an exit is: in [0, 1], row by row, from its logits as they are or from hidden states."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.measures.cosine import cosine
from megatron_ee.inference.measures.entropy import entropy
from megatron_ee.inference.measures.gate import gate
from megatron_ee.inference.measures.margin import margin
from megatron_ee.inference.measures.max_probability import max_probability
from megatron_ee.plugins import PluginError

Measure = Callable[[AskedExit], torch.Tensor]
"""Confidence [N] of each of an exit's rows: in [0, 1], floating, or NaN, which never fires. No row's depends on
another's, nor on how a request samples. It is computed where the logits are, without waiting for them."""

MEASURES: Mapping[str, Measure] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
    "cosine": cosine,
    "gate": gate,
}


def measure_of_logits(of_logits: Callable[[torch.Tensor], torch.Tensor]) -> Measure:
    """A plug-in's measure: logits_NV -> confidence [N]. One that gives something else is a PluginError when asked."""

    def measure(asked: AskedExit) -> torch.Tensor:
        confidence_N = of_logits(asked.logits)
        _check_is_confidence(confidence_N, num_rows=len(asked.logits))
        return confidence_N

    return measure


def _check_is_confidence(given: Any, *, num_rows: int) -> None:
    if not isinstance(given, torch.Tensor):
        what = type(given).__name__
    elif given.shape != (num_rows,) or not given.is_floating_point():
        what = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    else:
        return
    message = f"the plug-in's gives {what} for {num_rows} rows, not one floating number a row, [{num_rows}]"
    raise PluginError("inference.exit.measure", message)
