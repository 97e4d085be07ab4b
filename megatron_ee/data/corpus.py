"""The built-in corpus: the source files of the running Python's standard library.

It is real text (some 12 MB of code and prose), it is on every machine, and nothing is downloaded.
"""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ee.data.indexed import index_path, write_indexed
from megatron_ee.tokenizer import Tokenizer

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


def corpus_prefix(folder: Path, tokenizer_name: str) -> Path:
    """Where the corpus of this Python is kept; another Python's library is another corpus."""
    return folder / f"python-stdlib-{platform.python_version()}-{tokenizer_name}"


def write_corpus(prefix: Path, tokenizer: Tokenizer) -> None:
    """Write the corpus as an indexed dataset, unless it is there."""
    if not index_path(prefix).exists():
        write_indexed(prefix, documents(), tokenizer)


def documents(*, last: float = 1.0) -> Iterator[str]:
    """The source files, in an order that is fixed but mixes the packages (a split takes documents in order).

    Args:
        last: no more than this share of them, those at the end.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not _NOT_THE_LIBRARY & set(path.relative_to(root).parts)]
    paths.sort(key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())
    for path in paths[len(paths) - int(last * len(paths)) :]:
        text = path.read_bytes().decode(errors="replace")
        if text.strip():
            yield text


def bigram_cross_entropy(tokens: np.ndarray) -> float:
    """Nats per token of the best predictor that sees only the previous token, on the very text it was counted on:
    H(next | previous) of the empirical distribution. A model that does not beat it has learned no context."""
    size = int(tokens.max()) + 1
    pairs, counts = np.unique(tokens[:-1].astype(np.int64) * size + tokens[1:], return_counts=True)
    previous = np.bincount(tokens[:-1], minlength=size)
    return float((counts * np.log(previous[pairs // size] / counts)).sum() / counts.sum())
