"""Opens a checkpoint or a Hugging Face folder for decoding."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from megatron_ee.checkpoint.description import Description
from megatron_ee.checkpoint.folders import CheckpointError, is_huggingface
from megatron_ee.checkpoint.models import has_tokenizer
from megatron_ee.checkpoint.sharded import differences, model_state, shape_of_trunk
from megatron_ee.checkpoint.sources import ModelSource, open_source
from megatron_ee.config import Config, InferenceConfig, ParallelConfig
from megatron_ee.device import Device
from megatron_ee.inference.borders import stop_token_ids, tokens_before_text
from megatron_ee.inference.declared_exits import exits_to_decode
from megatron_ee.inference.facts import ModelFacts, facts_of
from megatron_ee.inference.measures import MEASURES, measure_of_logits
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.ring import Pipeline, Ring
from megatron_ee.inference.stage_layout import stage_stops
from megatron_ee.inference.stages import Stages
from megatron_ee.inference.weight_layout import arrange_weights
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.chunks import Chunk
from megatron_ee.parallel.mesh import Mesh, launched_ranks, open_mesh
from megatron_ee.parallel.world import MeshError
from megatron_ee.plugins import load_plugins
from megatron_ee.tokenizer import BYTES, Tokenizer, open_tokenizer


def load_model(folder: Path, config: Config, device: Device, *, dtype: torch.dtype | None = None) -> OpenedModel:
    """Open a step folder, whatever layout wrote it, or a Hugging Face folder. Processes that torchrun started together
    are the stages of `inference.parallel.pipeline`, and those of a stage split its matrices between them (tensor
    parallelism). Each then has to make the same calls.

    Args:
        dtype: to decode in, instead of the checkpoint's own.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another format version.
        FieldError: see `exits_to_decode`.
        MeshError: the model does not divide over so many processes.
    """
    parallel = _parallel(config.inference.parallel.pipeline)
    mesh = open_mesh(parallel, device)
    source = open_source(folder, mesh, reads_all=config.checkpoint.verify)
    description = source.description
    if description.trains == "exits":
        raise CheckpointError(f"checkpoint: {folder} holds exits alone; tools/merge_exits.py makes a model of it")
    if is_huggingface(folder):
        description = _described_by(config, folder, description)
        tokenizer = open_tokenizer(str(folder) if has_tokenizer(folder) else config.data.tokenizer)
    else:
        tokenizer = open_checkpoint_tokenizer(folder, description)
    _check_split(description, parallel.tensor)
    stages = _stages(description, config.inference, mesh)
    stage = _load_stage(source, description, stages, mesh, device, dtype)
    pipeline = join_stages(stage, stages, mesh, config.inference.parallel.timeout) if stages.count > 1 else None
    added = load_plugins(config.plugins).exit_measures
    return OpenedModel(
        stage,
        tokenizer,
        tuple(description.exits.layers),
        {**MEASURES, **{name: measure_of_logits(measure) for name, measure in added.items()}},
        stop_token_ids=stop_token_ids(folder, tokenizer),
        begin=tokens_before_text(folder, tokenizer),
        max_positions=description.model.max_position_embeddings,
        packs_weights=config.inference.pack_weights,
        mesh=mesh,
        pipeline=pipeline,
    )


def _parallel(pipeline: int) -> ParallelConfig:
    """How the processes that were started share the model."""
    ranks = launched_ranks()
    if ranks % pipeline:
        processes = "1 process doesn't" if ranks == 1 else f"{ranks} processes don't"
        raise MeshError("inference.parallel.pipeline", f"{processes} divide into {pipeline} stages")
    return ParallelConfig(tensor=ranks // pipeline, pipeline=pipeline)


def _stages(description: Description, inference: InferenceConfig, mesh: Mesh) -> Stages:
    if mesh.pipeline_size == 1:
        return Stages((description.model.num_layers,))
    stops = stage_stops(description.model, description.exits, inference, description.vocab_size)
    return Stages(stops, mesh.pipeline_rank)


def join_stages(stage: Stage, stages: Stages, mesh: Mesh, timeout: float) -> Pipeline:
    """What the stages of a mesh know of the whole model together, and how they reach each other. Collective.

    Args:
        timeout: see `Ring`, in seconds.
    """
    parts = mesh.gather(facts_of(stage))
    size, dtype = stage.model.hidden_size, stage.config.params_dtype
    ring = Ring(mesh, stages, hidden_size=size, dtype=dtype, timeout=timedelta(seconds=timeout))
    return Pipeline(stages, ModelFacts.joined(parts), ring)


def _load_stage(
    source: ModelSource,
    description: Description,
    stages: Stages,
    mesh: Mesh,
    device: Device,
    dtype: torch.dtype | None,
) -> Stage:
    """The layers that are here, laid out for decoding. An exit where a stage ends is on that stage, so that a token
    that leaves comes back at once."""
    first, last = stages.held(0, description.model.num_layers)
    exits = (*description.exits.layers, description.model.num_layers)
    stage = Stage(
        description.model,
        description.exits,
        [Chunk(first, last, tuple(layer for layer in exits if first < layer <= last))],
        vocab_size=description.vocab_size,
        groups=mesh.groups,
        device=device,
        dtype=DTYPES[description.precision],
    )
    stage.load_sharded(source.load(model_state(stage, mesh)))
    stage.eval().requires_grad_(False)
    if dtype is not None:
        _convert(stage, dtype)
    arrange_weights(stage)
    return stage


def open_checkpoint_tokenizer(folder: Path, description: Description) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with, from the checkpoint's own files.

    Raises:
        UserError: the files are damaged or gone, or their library is not installed.
    """
    if description.tokenizer == BYTES:
        return open_tokenizer(BYTES)
    tokenizer = open_tokenizer(str(folder), field="checkpoint")
    if tokenizer.name != description.tokenizer:
        raise CheckpointError(f"checkpoint: {folder} holds tokenizer {tokenizer.name}, not {description.tokenizer}")
    return tokenizer


def _described_by(config: Config, folder: Path, found: Description) -> Description:
    """What a Hugging Face folder holds, with the config's exits where it has none of its own."""
    wanted = replace(found, model=config.model)
    if different := differences(shape_of_trunk(found), shape_of_trunk(wanted)):
        raise CheckpointError(f"checkpoint: {folder} is of another model than the config: {different}")
    return replace(found, exits=exits_to_decode(folder, found.exits, config.exits))


def _convert(stage: Stage, dtype: torch.dtype) -> None:
    """To another dtype, also what the stage makes by its config's: rotations and masks."""
    stage.to(dtype)
    stage.config.params_dtype = dtype


def _check_split(description: Description, ranks: int) -> None:
    model = description.model
    sizes = {
        "num_key_value_heads": model.num_key_value_heads,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": description.vocab_size,
    }
    for name, size in sizes.items():
        if size % ranks:
            raise MeshError(f"model.{name}", f"{size} doesn't divide over {ranks} tensor-parallel ranks")
