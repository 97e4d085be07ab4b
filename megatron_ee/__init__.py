"""Early-exit language models: training through a pipeline, and decoding at the speed that exits promise."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ee.config import ExitParams, SamplingParams
    from megatron_ee.inference.completion import Completion
    from megatron_ee.inference.llm import LLM

__all__ = ["LLM", "Completion", "ExitParams", "SamplingParams"]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "megatron_ee.inference.llm",
    "Completion": "megatron_ee.inference.completion",
    "ExitParams": "megatron_ee.config",
    "SamplingParams": "megatron_ee.config",
}


def __getattr__(name: str) -> Any:
    """What is for everyone, imported when it is asked for: this package by itself imports next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
