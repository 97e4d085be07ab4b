"""Makes a folder of Hugging Face's of a checkpoint, tensor by tensor: the whole model is never in memory."""

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ee.checkpoint.description import Description, is_beside_state, read_description
from megatron_ee.checkpoint.folders import CheckpointError, DamagedError, find_checkpoint, written_aside
from megatron_ee.checkpoint.unsharded import StepReader, check_whole
from megatron_ee.checkpoint.verify import damage_of
from megatron_ee.config import ModelConfig, load_config
from megatron_ee.huggingface.architecture import config_json_of
from megatron_ee.huggingface.exit_files import EXIT_WEIGHTS_FILE, EXITS_FILE, exit_recipes, exits_json
from megatron_ee.huggingface.names import Recipe, recipes_of
from megatron_ee.huggingface.settings import CONFIG_FILE, read_json
from megatron_ee.huggingface.truncated import Truncated, truncated_at, whole
from megatron_ee.huggingface.writing import plan_shards, write_model, write_small, write_tensors
from megatron_ee.tokenizer import BYTES, open_tokenizer

_PIECE_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Exported:
    """What came of it: the folder, where it is from, the class in transformers, and the exits beside it."""

    folder: Path
    step: Path
    architecture: str
    exits: tuple[int, ...]


def export_model(
    source: Path, destination: Path, *, exit_layer: int | None = None, shard_size: int = 5 * 10**9
) -> Exported:
    """Write a folder that transformers loads without code of ours, with the model's exits beside it.

    The folder appears when it is complete.

    Args:
        source: a run folder (its newest checkpoint) or a step folder, of any layout.
        destination: not there yet.
        exit_layer: write the model that ends at this exit instead of the whole one.
        shard_size: bytes of a file, at most, unless one tensor is larger.

    Raises:
        UserError: the checkpoint is not there, damaged, of exits alone, or of a model that no architecture is of; there
            is no such exit; the destination exists or cannot be written.
    """
    step = find_checkpoint(source)
    description = _verified(step)
    model = description.model.model_copy(update={"vocab_size": description.vocab_size})
    written = whole(model) if exit_layer is None else truncated_at(model, description.exits, exit_layer)
    config = _config(step, description, written.model)
    reader = StepReader(step)
    recipes, of_exits = recipes_of(written.model), exit_recipes(model, description.exits) if exit_layer is None else {}
    check_whole(reader, ((written.sources[name], recipe.shape) for name, recipe in recipes.items()), step)
    check_whole(reader, ((name, recipe.shape) for name, recipe in of_exits.items()), step)
    makers = {tensor: recipe for recipe in recipes.values() for tensor in recipe.tensors}
    shapes = {tensor: makers[tensor].tensors[tensor] for tensor in makers}
    precision = description.precision
    with written_aside(destination) as aside:
        produce = partial(_rows, reader, written, makers)
        write_model(aside, plan_shards(shapes, precision, shard_size), precision, produce)
        if exit_layer is None and description.exits.layers:
            of_own = {name: recipe.shape for name, recipe in of_exits.items()}
            write_tensors(aside / EXIT_WEIGHTS_FILE, of_own, precision, partial(_own_rows, reader))
            write_small(aside / EXITS_FILE, exits_json(description.exits, description.hash))
        for name in description.files:
            if is_beside_state(name) and name != CONFIG_FILE:
                write_small(aside / name, (step / name).read_bytes())
        write_small(aside / CONFIG_FILE, json.dumps(config, indent=2).encode() + b"\n")
    exits = description.exits.layers if exit_layer is None else ()
    return Exported(destination, step, config["architectures"][0], exits)


def _verified(step: Path) -> Description:
    """The description of a whole model's checkpoint without damage."""
    description = read_description(step)
    if description.trains == "exits":
        raise CheckpointError(f"{step} holds exits alone; tools/merge_exits.py makes a model of it")
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: damage_of(step / name, description.files[name]), description.files)
        for name, damage in zip(description.files, found, strict=True):
            if damage:
                raise DamagedError(f"{step} is damaged: {name} {damage}")
    return description


def _config(step: Path, description: Description, model: ModelConfig) -> dict[str, Any]:
    """config.json: the one that the model came with, where there is one, as far as it still holds."""
    source = read_json(step / CONFIG_FILE) if CONFIG_FILE in description.files else None
    positions = load_config(step / "config.yaml").data.sequence_length
    config = config_json_of(model, description.precision, positions=positions, source=source)
    if source is None:
        tokenizer = open_tokenizer(BYTES if description.tokenizer == BYTES else str(step), field="checkpoint")
        pad = tokenizer.pad if tokenizer.pad >= 0 else None
        config |= {"bos_token_id": None, "eos_token_id": tokenizer.eod, "pad_token_id": pad}
    return config


def _rows(reader: StepReader, written: Truncated, makers: Mapping[str, Recipe], tensor: str) -> Iterator[torch.Tensor]:
    """One of their tensors, piece by piece."""
    recipe = makers[tensor]
    source = written.sources[recipe.name]
    for piece in recipe.back(tensor):
        for part in _read_rows(reader, source, piece.start, piece.stop):
            # logits of features / T are those of a norm whose weight is divided by T
            cools = recipe.name == "norm.weight" and written.temperature != 1
            yield (part.double() / written.temperature).to(part.dtype) if cools else part


def _own_rows(reader: StepReader, name: str) -> Iterator[torch.Tensor]:
    return _read_rows(reader, name, 0, reader.shapes[name][0])


def _read_rows(reader: StepReader, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Rows of a parameter, a few megabytes at a time."""
    height = max(1, _PIECE_BYTES // (8 * math.prod(reader.shapes[name][1:])))
    for first in range(start, stop, height):
        yield reader.read(name, first, min(first + height, stop))
