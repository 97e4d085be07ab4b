"""Logits are held beside each other token by token, so that exits need the final output's vocabulary."""

from collections.abc import Iterable

from megatron_ee.errors import FieldError
from megatron_ee.inference.facts import ModelFacts


def check_shared_vocabulary(facts: ModelFacts, mode: str, layers: Iterable[int]) -> None:
    """
    Args:
        layers: of the exits that are heard.

    Raises:
        FieldError: some have projections of another size than the final output's.
    """
    sizes = facts.vocabulary
    final = sizes[max(sizes)]
    others = {layer: sizes[layer] for layer in layers if sizes[layer] != final}
    if others:
        named = ", ".join(f"exit {layer} has {size}" for layer, size in others.items())
        raise FieldError("inference.exit.mode", f"{mode} needs one vocabulary: the final output has {final}, {named}")
