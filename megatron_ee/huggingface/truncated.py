"""The model that ends at an exit, as a stock model without one: which of our parameters is which of its.

An exit that is a norm is the model cut after its layer. A block is one layer more. An MLP head reads the state between
its layer's attention and that layer's MLP, and adds a branch as the layer does: it is that layer with another MLP.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ee.config import ExitsConfig, ModelConfig
from megatron_ee.errors import UserError
from megatron_ee.huggingface.names import recipes_of


@dataclass(frozen=True, slots=True)
class Truncated:
    """
    Attributes:
        model: the stock model.
        sources: name of each parameter of the stock model -> name of it in the whole model.
        temperature: what its logits have to be divided by.
    """

    model: ModelConfig
    sources: Mapping[str, str]
    temperature: float = 1.0


def whole(model: ModelConfig) -> Truncated:
    """All of the model."""
    return Truncated(model, {name: name for name in recipes_of(model)})


def truncated_at(model: ModelConfig, exits: ExitsConfig, layer: int) -> Truncated:
    """The model up to the exit after `layer`, with that exit's head.

    Args:
        model: its vocabulary resolved.

    Raises:
        UserError: there is no such exit.
    """
    if layer not in exits.layers:
        there_are = ", ".join(map(str, exits.layers)) or "none"
        raise UserError(f"--exit: there is no exit after layer {layer}; exits: {there_are}")
    head, owns_output = exits.head_of(layer), exits.projection_of(layer) == "own"
    num_layers = layer + (head == "block")
    windows = model.sliding_window_layers
    if windows != "all":
        windows = tuple(of for of in windows if of <= layer)
        windows += (num_layers,) if head == "block" and layer in windows else ()  # a block has its layer's window
    changes: dict[str, object] = {
        "num_layers": num_layers,
        "sliding_window_layers": windows,
        "tie_embeddings": model.tie_embeddings and not owns_output,
    }
    if not windows:
        changes |= {"sliding_window": None, "sliding_window_layers": "all"}
    cut = model.model_copy(update=changes)
    sources = {name: name for name in recipes_of(cut)}
    for name in sources:
        if head == "block" and name.startswith(prefix := f"layers.{num_layers}."):
            sources[name] = f"exits.{layer}.block.{name.removeprefix(prefix)}"
        elif head == "mlp" and name.startswith((f"layers.{layer}.mlp.", f"layers.{layer}.pre_mlp_layernorm.")):
            sources[name] = f"exits.{layer}.{name.removeprefix(f'layers.{layer}.')}"
    if exits.norm == "own":
        sources["norm.weight"] = f"exits.{layer}.norm.weight"
    if owns_output:
        sources["output.weight"] = f"exits.{layer}.output.weight"
    return Truncated(cut, sources, exits.temperature_of(layer))
