"""megatron-core's indexed dataset on disk: a .bin of tokens and an .idx that says where documents begin."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ee.tokenizer import Tokenizer


def write_indexed(prefix: Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    """Write each document's tokens and an end-of-document token.

    Both files are written aside and renamed, the index last, so that a half-written dataset is never read.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    aside = prefix.with_name(f"{prefix.name}.{os.getpid()}.tmp")
    aside_index = aside.with_name(aside.name + ".idx")
    try:
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        builder = IndexedDatasetBuilder(str(aside), dtype=dtype)
        for text in documents:
            tokens = [*tokenizer.encode(text), tokenizer.eod]
            builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(tokens)])
        builder.finalize(str(aside_index))
        aside.replace(bin_path(prefix))
        aside_index.replace(index_path(prefix))
    finally:
        aside.unlink(missing_ok=True)
        aside_index.unlink(missing_ok=True)


def read_tokens(prefix: Path) -> np.ndarray:
    """All tokens of a dataset, in order."""
    dataset = IndexedDataset(str(prefix))
    return np.concatenate([dataset[document] for document in range(len(dataset))])


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def index_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")
