"""The built-in corpus: the source files of the running Python's standard library, as megatron-core's indexed dataset.

It is real text (some 10 MB of code and prose), it is on every machine, and nothing is downloaded.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ee.tokenizer import Tokenizer

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


def write_corpus(folder: Path, tokenizer: Tokenizer, tokenizer_name: str) -> Path:
    """Write the corpus unless it is there; returns the path prefix of its .bin and .idx.

    Both files are written aside and renamed, the index last, so a half-written dataset is never read.
    """
    prefix = folder / f"python-stdlib-{platform.python_version()}-{tokenizer_name}"
    if index_path(prefix).exists():
        return prefix
    folder.mkdir(parents=True, exist_ok=True)
    aside = prefix.with_name(f"{prefix.name}.{os.getpid()}.tmp")
    try:
        builder = IndexedDatasetBuilder(str(aside), dtype=np.uint16)
        for text in documents():
            tokens = [*tokenizer.encode(text), tokenizer.eod]
            builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(tokens)])
        builder.finalize(str(aside) + ".idx")
        aside.replace(bin_path(prefix))
        Path(str(aside) + ".idx").replace(index_path(prefix))
    finally:
        aside.unlink(missing_ok=True)
        Path(str(aside) + ".idx").unlink(missing_ok=True)
    return prefix


def documents() -> Iterator[str]:
    """The source files, in an order that is fixed but mixes the packages (a split takes documents in order)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not _NOT_THE_LIBRARY & set(path.relative_to(root).parts)]
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest()):
        text = path.read_bytes().decode(errors="replace")
        if text.strip():
            yield text


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def index_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def bigram_cross_entropy(tokens: np.ndarray) -> float:
    """Nats per token of the best predictor that sees only the previous token, on the very text it was counted on:
    H(next | previous) of the empirical distribution. A model that does not beat it has learned no context."""
    size = int(tokens.max()) + 1
    pairs = np.bincount(tokens[:-1].astype(np.int64) * size + tokens[1:], minlength=size * size)
    joint = pairs.reshape(size, size) / pairs.sum()
    previous = joint.sum(axis=1, keepdims=True)
    conditional = np.divide(joint, previous, out=np.ones_like(joint), where=joint > 0)
    return float(-(joint * np.log(conditional)).sum())
