"""Early exits beside a model of Hugging Face's: exits.json says what they are, exits.safetensors has their weights.

The parameters have our names (exits.6.norm.weight), and are as in the whole model, split over no ranks. Where exits
share the model's norm and projection there are none, and the model alone is all that transformers'
`generate(assistant_early_exit=E)` needs.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ee.config import ExitsConfig, ModelConfig
from megatron_ee.errors import UserError
from megatron_ee.huggingface.names import Recipe, Shape, layer_recipes, own_recipe
from megatron_ee.huggingface.settings import Settings, read_json
from megatron_ee.parallel.products import gate_width

EXITS_FILE = "exits.json"
EXIT_WEIGHTS_FILE = "exits.safetensors"
VERSION = 1

_FIELDS = {
    "layers": "layers",
    "head": "heads",
    "projection": "projections",
    "temperature": "temperatures",
    "gate": "gates",
    "norm": "norm",
}
"""Field of the config -> in the file."""


def exits_json(exits: ExitsConfig, checkpoint_hash: str) -> bytes:
    """The content of exits.json.

    Args:
        checkpoint_hash: of the description of the checkpoint that they are from.
    """
    content = {
        "version": VERSION,
        "layers": list(exits.layers),
        "heads": [exits.head_of(layer) for layer in exits.layers],
        "projections": [exits.projection_of(layer) for layer in exits.layers],
        "temperatures": [exits.temperature_of(layer) for layer in exits.layers],
        "gates": [exits.gate_of(layer) for layer in exits.layers],
        "norm": exits.norm,
        "checkpoint_hash": checkpoint_hash,
    }
    return json.dumps(content, indent=1).encode()


def read_exits(folder: Path, model: ModelConfig) -> ExitsConfig:
    """The exits that lie beside a model; none where there is no exits.json.

    Raises:
        UserError: the file is of another version, or is not what `exits_json` wrote, or not for this model.
    """
    path = folder / EXITS_FILE
    if not path.exists():
        return ExitsConfig()
    content = read_json(path)
    if content.get("version") != VERSION:
        raise Settings(content, str(path)).refusal("version", f"this release reads {VERSION}")
    try:
        exits = ExitsConfig.model_validate({field: content[name] for field, name in _FIELDS.items()})
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not what was written ({' '.join(str(error).split())})") from error
    if exits.layers and exits.layers[-1] >= model.num_layers:
        raise UserError(f"{path}: an exit after layer {exits.layers[-1]}, but the model has {model.num_layers}")
    return exits


def exit_recipes(model: ModelConfig, exits: ExitsConfig) -> dict[str, Recipe]:
    """Every parameter of the exits' own, by its name; it is stored as it is.

    Args:
        model: its vocabulary resolved.
    """
    shapes = {name: shape for layer in exits.layers for name, shape in _shapes(model, exits, layer)}
    return {name: own_recipe(name, shape) for name, shape in shapes.items()}


def _shapes(model: ModelConfig, exits: ExitsConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    prefix, hidden = f"exits.{layer}.", model.hidden_size
    head, gate = exits.head_of(layer), exits.gate_of(layer)
    if head == "block":
        yield from ((recipe.name, recipe.shape) for recipe in layer_recipes(model, f"{prefix}block.", layer))
    if head == "mlp":
        of_layer = layer_recipes(model, prefix, layer)
        yield from ((recipe.name, recipe.shape) for recipe in of_layer if "mlp" in recipe.name.removeprefix(prefix))
    if exits.norm == "own":
        yield f"{prefix}norm.weight", (hidden,)
    if exits.projection_of(layer) == "own":
        assert isinstance(model.vocab_size, int)
        yield f"{prefix}output.weight", (model.vocab_size, hidden)
    if gate != "none":
        width = gate_width(hidden) if gate == "mlp" else hidden
        yield f"{prefix}gate.norm.weight", (hidden,)
        if gate == "mlp":
            yield f"{prefix}gate.hidden.weight", (width, hidden)
            yield f"{prefix}gate.hidden.bias", (width,)
        yield f"{prefix}gate.output.weight", (1, width)
        yield f"{prefix}gate.output.bias", (1,)
