"""Training and validation sequences: of conversations, or of documents through megatron-core's GPTDataset, from one
dataset or a weighted blend."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_ee.config import Config, DataConfig
from megatron_ee.data.chat_samples import open_chat_samples
from megatron_ee.data.corpus import corpus_prefix, write_corpus
from megatron_ee.data.index_cache import index_cache
from megatron_ee.data.indexed import DatasetError, Index, bin_path, read_index, read_meta
from megatron_ee.data.loader import SampleSource
from megatron_ee.errors import FieldError
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.tokenizer import Tokenizer

BUILT_IN = "python-stdlib"

_SPLITS = ("training", "validation", "test")
_SAMPLED_SPANS, _SPAN_TOKENS = 256, 4096


@dataclass(frozen=True, slots=True)
class Datasets:
    """The splits of a run, with the samples that it asks for or more; `valid` is None where it asks for none."""

    train: SampleSource
    valid: SampleSource | None


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset that a config names.

    Attributes:
        field: where it is named, for messages.
        weight: relative to those of the blend's other datasets.
    """

    field: str
    prefix: Path
    weight: float
    is_built_in: bool


def open_datasets(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, *, num_train_samples: int | None = None
) -> Datasets:
    """Build the run's datasets; the first rank writes what has to be written, the others wait for it.

    Args:
        num_train_samples: default: what the run draws from its beginning to its end.

    Raises:
        FieldError: no .bin/.idx pair where the config says, one that is damaged or of another tokenizer, or a split
            without documents for its samples; for conversations, see `open_chat_samples`.
    """
    training = config.training
    if num_train_samples is None:
        num_train_samples = training.train_iters * training.global_batch_size
    num_samples = [num_train_samples, training.eval_iters * training.global_batch_size]
    if config.data.format == "messages":
        return Datasets(*open_chat_samples(config, tokenizer, mesh, num_samples))
    sources = sources_of(config.data, tokenizer)
    write_built_in(sources, tokenizer, mesh)
    indices = check_sources(sources, config, tokenizer)
    recipe = _recipe(config, sources, num_samples, tokenizer)
    for split, bounds in enumerate(recipe.split_matrix):
        if split < len(num_samples) and num_samples[split]:
            for source, index in zip(sources, indices, strict=True):
                _check_split(source, index, _SPLITS[split], bounds)
        else:
            recipe.split_matrix[split] = None  # nobody asks for it, and megatron-core hangs on one without tokens
    key = [config.seed, config.data.sequence_length, recipe.blend, recipe.split_matrix, num_samples, tokenizer.name]
    prefixes = [source.prefix for source in sources]
    with index_cache(Path(config.data.folder) / "cache", key, prefixes, mesh) as cache:
        recipe.path_to_cache = str(cache)
        train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [*num_samples, 0], lambda: True, recipe).build()
    return Datasets(train, valid)


def sources_of(data: DataConfig, tokenizer: Tokenizer) -> list[Source]:
    """The datasets that a config names, in its order."""
    if isinstance(data.dataset, str):
        named = [("data.dataset", data.dataset, 1.0)]
    else:
        named = [(f"data.dataset.{i}.path", entry.path, entry.weight) for i, entry in enumerate(data.dataset)]
    built_in = corpus_prefix(Path(data.folder), tokenizer.name)
    return [
        Source(field, built_in if path == BUILT_IN else Path(path), weight, path == BUILT_IN)
        for field, path, weight in named
    ]


def write_built_in(sources: list[Source], tokenizer: Tokenizer, mesh: Mesh | None = None) -> None:
    """Write the built-in corpus if it is among the sources and not there; without a mesh, this process is alone."""
    for source in sources:
        if source.is_built_in:
            if mesh is None or mesh.is_main:
                write_corpus(source.prefix, tokenizer)
            if mesh is not None:
                mesh.barrier()


def check_sources(sources: list[Source], config: Config, tokenizer: Tokenizer) -> list[Index]:
    """The sources' indices.

    Raises:
        FieldError: one is missing, damaged, or of another tokenizer.
    """
    indices = []
    for source in sources:
        try:
            index = read_index(source.prefix)
        except DatasetError as error:
            hint = "" if bin_path(source.prefix).exists() else f" ({BUILT_IN} is built in)"
            raise FieldError(source.field, f"{error}{hint}") from error
        _check_tokenizer(source, index, config, tokenizer)
        indices.append(index)
    return indices


def _check_tokenizer(source: Source, index: Index, config: Config, tokenizer: Tokenizer) -> None:
    """A dataset of another tokenizer would train a model of nonsense, or ask the embedding for a row that isn't there.

    A dataset of another tool doesn't say what it is of: then tokens are sampled, so that any use of ids beyond the
    vocabulary is found that isn't very rare.
    """
    written_by = read_meta(source.prefix).get("tokenizer")
    if written_by is not None:
        if written_by != tokenizer.name:
            raise FieldError(
                source.field,
                f"{source.prefix} was written with tokenizer {written_by}, "
                f"but data.tokenizer {config.data.tokenizer} is {tokenizer.name}",
            )
        return
    limit = tokenizer.vocab_size if config.model.vocab_size == "auto" else config.model.vocab_size
    largest = largest_sampled_token(source.prefix, index)
    if largest >= limit:
        raise FieldError(
            source.field,
            f"{source.prefix} holds token {largest}, beyond a vocabulary of {limit}: "
            "name the tokenizer that it was written with as data.tokenizer, or set model.vocab_size",
        )


def largest_sampled_token(prefix: Path, index: Index) -> int:
    """The largest token id in some two megabytes, evenly spread; in all of a dataset that is not larger."""
    tokens = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r", shape=(index.num_tokens,))
    last = max(0, len(tokens) - _SPAN_TOKENS)
    starts = np.unique(np.linspace(0, last, _SAMPLED_SPANS, dtype=np.int64))
    if len(tokens) <= _SAMPLED_SPANS * _SPAN_TOKENS:
        return int(tokens.max())
    return max(int(tokens[start : start + _SPAN_TOKENS].max()) for start in starts)


def _check_split(source: Source, index: Index, name: str, bounds: tuple[float, float] | None) -> None:
    """megatron-core divides documents by their number, rounded; it never returns from a split without tokens."""
    num_documents = len(index.lengths)
    first, stop = (round(bound * num_documents) for bound in bounds or (0, 0))
    if not index.lengths[first:stop].any():
        raise FieldError(
            "data.split", f"no documents left for {name}: {source.field} {source.prefix} has {num_documents}"
        )


def _recipe(config: Config, sources: list[Source], num_samples: list[int], tokenizer: Tokenizer) -> GPTDatasetConfig:
    prefixes, weights = [str(source.prefix) for source in sources], [source.weight for source in sources]
    return GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.data.sequence_length,
        blend=(prefixes, weights if len(sources) > 1 else None),
        mid_level_dataset_surplus=_surplus(weights, num_samples),
        split=",".join(str(share) for share in config.data.split),
        tokenizer=_IdentifiedTokenizer(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _surplus(weights: list[float], num_samples: list[int]) -> float:
    """How much more than its share each dataset must be able to give.

    megatron-core rounds every share up, so a blend of n is up to n samples longer than asked; of these a dataset
    gives its share too, and one more at most. Its own default forgets that and fails on small numbers.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    return max(
        (share * len(shares) + 1) / math.ceil(share * count) for share in shares for count in num_samples if count
    )


class _IdentifiedTokenizer:
    """What megatron-core's dataset asks of a tokenizer; the identifiers name the index cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod, self.pad, self.vocab_size = tokenizer.eod, tokenizer.pad, tokenizer.vocab_size
        self.unique_identifiers = {"class": "megatron_ee", "name": tokenizer.name}
