"""From text files to an indexed dataset."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_ee.data.aside import written_aside
from megatron_ee.data.encoding import Skipped, count_skipped, encode_in_order
from megatron_ee.data.indexed import IndexedWriter, bin_path, index_path, write_aside
from megatron_ee.data.sources import UnusableError, read_records, text_of, unreadable
from megatron_ee.errors import UserError
from megatron_ee.tokenizer import open_tokenizer, train_bpe


@dataclass(frozen=True, slots=True)
class Job:
    """What to make of which files.

    Attributes:
        output: path prefix of the dataset.
        tokenizer: see `open_tokenizer`; unused when a BPE is trained.
        bpe_vocab_size: train a byte-level BPE on the input first, and write it as PREFIX.tokenizer.json.
    """

    inputs: Sequence[Path]
    output: Path
    tokenizer: str = "bytes"
    bpe_vocab_size: int | None = None
    json_key: str = "text"
    num_workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of it.

    Attributes:
        num_bytes: of the documents' texts, in UTF-8.
        seconds: for encoding and writing; training a BPE took `training_seconds` before.
        skipped: kind -> records without a text.
        tokenizer: for the config's data.tokenizer.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    vocab_size: int
    seconds: float
    training_seconds: float
    skipped: dict[str, Skipped]
    tokenizer: str


def tokenizer_path(prefix: Path) -> Path:
    """Where the BPE that was trained for a dataset is."""
    return prefix.with_name(prefix.name + ".tokenizer.json")


def preprocess(job: Job) -> Summary:
    """Write the dataset. The same job makes the same bytes with any number of workers.

    Raises:
        UserError: an input or the tokenizer cannot be read, the output exists, an object lacks the key, no document
            is left, or the disk is full. Then there is no output.
    """
    _check(job)
    aside_for_tokenizer = written_aside(tokenizer_path(job.output)) if job.bpe_vocab_size else nullcontext(None)
    try:
        with aside_for_tokenizer as trained:
            started = time.perf_counter()
            if trained is not None:
                trained.write_bytes(_train(job))
            training_seconds = time.perf_counter() - started
            return _encode(job, trained, training_seconds)
    except OSError as error:
        raise UserError(f"--output: {job.output}: cannot be written ({error.strerror})") from error


def _check(job: Job) -> None:
    outputs = [bin_path(job.output), index_path(job.output)]
    if job.bpe_vocab_size:
        outputs.append(tokenizer_path(job.output))
    for path in outputs:
        if path.exists() and not job.overwrite:
            raise UserError(f"--output: {path} exists; take another name, or --overwrite")
    for path in job.inputs:
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise unreadable(path, error) from error


def _train(job: Job) -> bytes:
    assert job.bpe_vocab_size is not None
    with _progress(job.inputs, "training") as advance:
        definition = train_bpe(_texts(job, advance), job.bpe_vocab_size)
    return definition


def _texts(job: Job, advance: Callable[[int], object]) -> Iterator[str]:
    for record in read_records(job.inputs, advance):
        try:
            yield text_of(record, job.json_key)
        except UnusableError:
            continue  # counted when it is encoded


def _encode(job: Job, trained: Path | None, training_seconds: float) -> Summary:
    source = job.tokenizer if trained is None else str(trained)
    tokenizer = open_tokenizer(source, field="--tokenizer")
    companions = {} if trained is None else {trained: tokenizer_path(job.output)}
    started = time.perf_counter()
    with write_aside(job.output, tokenizer, companions=companions) as writer:
        num_bytes, skipped = _write_all(job, source, writer)
        if not writer.num_documents:
            raise UserError(f"--output: no document in the input{describe_skipped(skipped, ': ')}")
    return Summary(
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_bytes=num_bytes,
        vocab_size=tokenizer.vocab_size,
        seconds=time.perf_counter() - started,
        training_seconds=training_seconds,
        skipped=skipped,
        tokenizer=job.tokenizer if trained is None else str(tokenizer_path(job.output)),
    )


def _write_all(job: Job, source: str, writer: IndexedWriter) -> tuple[int, dict[str, Skipped]]:
    num_bytes = 0
    skipped: dict[str, Skipped] = {}
    with _progress(job.inputs, "encoding") as advance:
        records = read_records(job.inputs, advance)
        for encoded in encode_in_order(records, source, job.json_key, num_workers=job.num_workers):
            writer.add(encoded.tokens, encoded.lengths)
            num_bytes += encoded.num_bytes
            count_skipped(skipped, encoded.skipped)
    return num_bytes, skipped


def describe_skipped(skipped: dict[str, Skipped], before: str = "") -> str:
    """Each kind with its count and its first place; empty when nothing was skipped."""
    kinds = [f"{many.count} {kind} (first: {many.first})" for kind, many in skipped.items()]
    return before + ", ".join(kinds) if kinds else ""


@contextmanager
def _progress(paths: Sequence[Path], what: str) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of the input files, on a terminal only."""
    total = sum(path.stat().st_size for path in paths)
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update
