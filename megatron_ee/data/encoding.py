"""Records to tokens, in this process or in several. Nothing here imports torch: a worker is ready in an instant."""

import functools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from megatron_ee.data.indexed import token_type
from megatron_ee.data.sources import Record, UnusableError, text_of
from megatron_ee.errors import UserError
from megatron_ee.interrupts import interrupts_deferred
from megatron_ee.tokenizer import Tokenizer, open_tokenizer

BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Skipped:
    """Records of one kind that hold no text."""

    count: int
    first: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """The documents of a batch of records, one after the other, each with its end-of-document token.

    Attributes:
        lengths: tokens of each document.
        num_bytes: of their texts, in UTF-8.
        skipped: kind -> records without a text.
    """

    tokens: np.ndarray
    lengths: list[int]
    num_bytes: int
    skipped: dict[str, Skipped] = field(default_factory=dict)


def encode_records(records: Sequence[Record], tokenizer: Tokenizer, json_key: str) -> Encoded:
    """
    Raises:
        UserError: an object lacks the key.
    """
    dtype = token_type(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    skipped: dict[str, Skipped] = {}
    num_bytes = 0
    for record in records:
        try:
            text = text_of(record, json_key)
        except UnusableError as error:
            count_skipped(skipped, {str(error): Skipped(1, record.place)})
            continue
        first = len(parts)
        for piece in tokenizer.pieces(text):  # a list of a long text's tokens would take many times its memory
            parts.append(np.array(tokenizer.encode(piece), dtype=dtype))
            num_bytes += len(piece.encode())
        parts.append(np.array([tokenizer.eod], dtype=dtype))
        lengths.append(sum(map(len, parts[first:])))
    return Encoded(np.concatenate(parts) if parts else np.empty(0, dtype), lengths, num_bytes, skipped)


def encode_in_order(
    records: Iterable[Record], source: str, json_key: str, *, num_workers: int, batch_bytes: int = BATCH_BYTES
) -> Iterator[Encoded]:
    """Encode in batches; they come out in the order of the records, however many workers there are.

    Args:
        source: the tokenizer's, for `open_tokenizer`: each worker opens its own.

    Raises:
        UserError: an object lacks the key, or a worker was killed.
    """
    batches = _batches(records, batch_bytes)
    if num_workers == 1:
        tokenizer = open_tokenizer(source)
        yield from (encode_records(batch, tokenizer, json_key) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_follow_parent)
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            with interrupts_deferred():  # here the workers are started
                pending.append(pool.submit(_encode_in_worker, batch, source, json_key))
            if len(pending) > 2 * num_workers:  # bounds memory, and leaves every worker its next batch
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("--workers: a worker was killed; too little memory for so many?") from error
    finally:
        pool.shutdown(cancel_futures=True)


def count_skipped(total: dict[str, Skipped], more: dict[str, Skipped]) -> None:
    """Add later counts to earlier ones."""
    for kind, skipped in more.items():
        before = total.get(kind)
        total[kind] = Skipped(before.count + skipped.count, before.first) if before else skipped


def _batches(records: Iterable[Record], batch_bytes: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_worker(records: Sequence[Record], source: str, json_key: str) -> Encoded:
    return encode_records(records, _opened(source), json_key)


@functools.cache
def _opened(source: str) -> Tokenizer:
    """A worker's own tokenizer; a worker serves one call of `encode_in_order`, so the source is always the same."""
    return open_tokenizer(source)


def _follow_parent() -> None:
    """A worker whose parent was killed would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
