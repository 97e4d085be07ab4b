"""Documents as they lie in files: one in a text file, one a line in .jsonl, both also gzipped."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from megatron_ee.errors import UserError

_BOM = b"\xef\xbb\xbf"
_LINES = {".jsonl", ".json"}  # Megatron's own tools call files of one object a line .json


@dataclass(frozen=True, slots=True)
class Record:
    """A document that nobody has looked into.

    Attributes:
        place: its file, with the line number where a file holds many.
        is_json: whether `raw` is a line of JSON; else it is text.
    """

    raw: bytes
    place: str
    is_json: bool


class UnusableError(Exception):
    """A record without a text; says what kind of record it is, for counting."""


def read_records(paths: Sequence[Path], on_read: Callable[[int], object] = lambda size: None) -> Iterator[Record]:
    """All records of the files, in order.

    Args:
        on_read: told how many more bytes of the files, as they lie on disk, have been read.

    Raises:
        UserError: a file cannot be read, or its compression is damaged.
    """
    for path in paths:
        read = 0
        try:
            with path.open("rb") as file:
                for record in _records_of(path, file):
                    yield record
                    on_read(file.tell() - read)
                    read = file.tell()
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(path, error) from error


def text_of(record: Record, json_key: str) -> str:
    """The record's text.

    Raises:
        UnusableError: broken or empty; its message is the kind.
        UserError: an object lacks the key.
    """
    try:
        content = record.raw.decode()
    except UnicodeDecodeError:
        raise UnusableError("not UTF-8") from None
    text = _text_in_json(content, record.place, json_key) if record.is_json and content.strip() else content
    if not text.strip():
        raise UnusableError("empty")
    return text


def unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{path}: cannot be read ({reason})")


def _records_of(path: Path, file: BinaryIO) -> Iterator[Record]:
    is_compressed = path.suffix.lower() == ".gz"
    kind = path.with_suffix("").suffix if is_compressed else path.suffix
    content = gzip.GzipFile(fileobj=file) if is_compressed else file
    if kind.lower() in _LINES:
        for number, line in enumerate(content, start=1):
            yield Record(line.removeprefix(_BOM) if number == 1 else line, f"{path}:{number}", True)
    else:
        yield Record(content.read().removeprefix(_BOM), str(path), False)


def _text_in_json(line: str, place: str, json_key: str) -> str:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        raise UnusableError("not JSON") from None
    if not isinstance(tree, dict):
        raise UnusableError("no JSON object")
    if json_key not in tree:
        nearest = get_close_matches(json_key, tree, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{place}: --json-key: no {json_key!r} among {', '.join(map(repr, tree)) or 'no keys'}{hint}")
    text = tree[json_key]
    if not isinstance(text, str):
        raise UnusableError(f"{json_key!r} is no string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableError("half a surrogate pair") from None
    return text
