"""The modules of a stage, as its chunks and the config want them: embedding, layers, exits, and what exits share."""

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ee.config import ExitsConfig
from megatron_ee.model.exit_head import ExitHead, make_projection
from megatron_ee.model.layers import LayerParts, layer_spec
from megatron_ee.parallel.chunks import Chunk


def make_embedding(
    config: TransformerConfig, groups: ProcessGroupCollection, vocab_size: int
) -> VocabParallelEmbedding:
    """Its rows are the vocabulary, split over tensor-parallel ranks."""
    return VocabParallelEmbedding(
        vocab_size,
        config.hidden_size,
        init_method=config.init_method,
        reduce_scatter_embeddings=config.sequence_parallel,
        config=config,
        tp_group=groups.tp,
    )


def make_layers(
    chunks: Sequence[Chunk], config: TransformerConfig, parts: LayerParts, groups: ProcessGroupCollection
) -> torch.nn.ModuleDict:
    """By their global numbers, counted from 1."""
    spec = layer_spec(parts, config)
    return torch.nn.ModuleDict(
        {
            str(layer): build_module(spec, config=config, layer_number=layer, pg_collection=groups)
            for chunk in chunks
            for layer in range(chunk.start + 1, chunk.stop + 1)
        }
    )


def make_exits(
    layers: Sequence[int],
    exits: ExitsConfig,
    config: TransformerConfig,
    parts: LayerParts,
    groups: ProcessGroupCollection,
    vocab_size: int,
) -> torch.nn.ModuleDict:
    """The exits after `layers`, by these numbers."""
    return torch.nn.ModuleDict(
        {
            str(layer): ExitHead(
                config,
                parts,
                groups,
                layer=layer,
                kind=exits.head_of(layer),
                vocab_size=vocab_size,
                owns_projection=exits.projection_of(layer) == "own",
                owns_norm=exits.norm == "own",
                temperature=exits.temperature_of(layer),
                gate=exits.gate_of(layer),
            )
            for layer in layers
        }
    )


def make_shared_norm(
    layers: Sequence[int], exits: ExitsConfig, config: TransformerConfig, parts: LayerParts
) -> torch.nn.Module | None:
    """The norm that all exits share, if they do and there are any."""
    if exits.norm != "shared" or not layers:
        return None
    norm: torch.nn.Module = parts.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
    return norm


def make_shared_projection(
    layers: Sequence[int],
    exits: ExitsConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    vocab_size: int,
    *,
    borrows: bool,
) -> ColumnParallelLinear | None:
    """The projection that some of these exits share, if any do.

    Args:
        borrows: whether its weight is the embedding's, which the stage has.
    """
    if all(exits.projection_of(layer) == "own" for layer in layers):
        return None
    return make_projection(config, groups, vocab_size, has_weight=not borrows)
