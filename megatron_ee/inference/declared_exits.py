"""The early exits that a Hugging Face folder is decoded with: its own, or such as need no parameters of their own.

Models that were trained by LayerSkip's recipe (Elhoushi et al., arXiv 2404.16710) are plain Llamas in Hugging Face's
format: nothing in them says that they have an exit after every layer, whose norm and projection are the model's.
"""

import logging
from pathlib import Path

from megatron_ee.config import ExitsConfig
from megatron_ee.errors import FieldError


def exits_to_decode(folder: Path, own: ExitsConfig, declared: ExitsConfig) -> ExitsConfig:
    """
    Args:
        own: what the folder says of its exits; no layers where it has none.
        declared: the config's.

    Raises:
        FieldError: the config declares exits that have parameters and aren't there, or others than are there.
    """
    if not declared.layers:
        return own
    if own.layers:
        for field in ("layers", "norm", "head", "projection", "gate", "temperature"):
            if _each(own, field) != _each(declared, field):
                raise FieldError(f"exits.{field}", f"{folder} has exits after layers {list(own.layers)}, as trained")
        return own
    if declared.norm != "shared":
        raise FieldError("exits.norm", _lacks(folder, declared.layers[0], "a norm of its own"))
    for layer in declared.layers:
        if declared.projection_of(layer) != "shared":
            raise FieldError("exits.projection", _lacks(folder, layer, "a projection of its own"))
        if declared.gate_of(layer) != "none":
            raise FieldError("exits.gate", _lacks(folder, layer, "a gate"))
    logging.getLogger("megatron_ee").warning(
        "exits %s share the norm and the projection of %s, and nothing says that they were trained",
        ", ".join(map(str, declared.layers)),
        folder,
    )
    return declared


def _lacks(folder: Path, layer: int, part: str) -> str:
    return (
        f"exit {layer} has {part}, but {folder} has no exits (exits.json); without, there can be exits with norm: "
        f"shared and projection: shared"
    )


def _each(exits: ExitsConfig, field: str) -> object:
    """A field's value for each exit, whether it is written once or in a list."""
    match field:
        case "head":
            return [exits.head_of(layer) for layer in exits.layers]
        case "projection":
            return [exits.projection_of(layer) for layer in exits.layers]
        case "gate":
            return [exits.gate_of(layer) for layer in exits.layers]
        case "temperature":
            return [exits.temperature_of(layer) for layer in exits.layers]
    return getattr(exits, field)
