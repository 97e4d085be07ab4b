"""Logits are held beside each other token by token, so that exits need the final output's vocabulary."""

from collections.abc import Iterable

from megatron_ee.errors import FieldError
from megatron_ee.model.stage import Stage


def check_shared_vocabulary(stage: Stage, mode: str, layers: Iterable[int]) -> None:
    """
    Args:
        layers: of the exits that are heard.

    Raises:
        FieldError: some have projections of another size than the final output's.
    """
    final = _size(stage, stage.model.num_layers)
    others = {layer: size for layer in layers if (size := _size(stage, layer)) != final}
    if others:
        named = ", ".join(f"exit {layer} has {size}" for layer, size in others.items())
        raise FieldError("inference.exit.mode", f"{mode} needs one vocabulary: the final output has {final}, {named}")


def _size(stage: Stage, layer: int) -> int:
    return int(stage.projection_weight(layer).shape[0]) * stage.tp_group.size()
