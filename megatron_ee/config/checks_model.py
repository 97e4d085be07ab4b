"""Rules of the section `model`: each is a generator of (path, message) pairs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ee.config.model import ModelConfig
    from megatron_ee.config.schema import Config

Problems = Iterator[tuple[str, str]]


def model_problems(model: "ModelConfig") -> Problems:
    """What is wrong within the section."""
    heads = model.num_attention_heads
    if heads % model.num_key_value_heads:
        yield "num_key_value_heads", f"{model.num_key_value_heads} must divide num_attention_heads = {heads}"
    if "head_dim" not in model.model_fields_set and model.hidden_size % heads:
        yield "hidden_size", f"{model.hidden_size} doesn't divide over {heads} heads, nor is head_dim set"
    if model.head_dim % 2:
        yield "head_dim", f"{model.head_dim} must be even: rotary positions turn pairs of channels"
    if model.rope_scaling is not None and model.rope_scaling.kind == "yarn" and model.rope_theta <= 1:
        yield "rope_theta", f"{model.rope_theta} must be above 1 for rope_scaling of kind yarn"
    yield from _window_problems(model)


def length_problems(config: "Config") -> Problems:
    """Sequences that are longer than the model is made for."""
    length, longest = config.data.sequence_length, config.model.max_position_embeddings
    if longest is not None and length > longest:
        yield "data.sequence_length", f"{length} is beyond model.max_position_embeddings = {longest}"


def _window_problems(model: "ModelConfig") -> Problems:
    layers = model.sliding_window_layers
    if layers == "all":
        return
    if model.sliding_window is None:
        yield "sliding_window_layers", f"{list(layers)} needs sliding_window, which is null"
    if list(layers) != sorted(set(layers)):
        yield "sliding_window_layers", f"{list(layers)} must ascend, without duplicates"
    for number, layer in enumerate(layers):
        if layer > model.num_layers:
            yield f"sliding_window_layers.{number}", f"{layer} is beyond num_layers = {model.num_layers}"
