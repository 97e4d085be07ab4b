"""Conversations in a .jsonl, as tokens: encoded once, kept in a folder, mapped by every rank."""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_ee.data.aside import written_aside
from megatron_ee.data.sources import Record, read_records
from megatron_ee.errors import FieldError, UserError, did_you_mean
from megatron_ee.tokenizer import Tokenizer
from megatron_ee.tokenizer.chat import ChatTemplate
from megatron_ee.tokenizer.messages import ChatError, Message, has_answer, parse_messages

_VERSION = 1  # of what is kept: another one is encoded again


@dataclass(frozen=True, slots=True)
class TooLong:
    """Conversations with more tokens than a sequence takes, which are left out.

    Attributes:
        first_line, first_length: of the first of them: its line in the file, and its tokens.
    """

    count: int = 0
    first_line: int = 0
    first_length: int = 0


@dataclass(frozen=True, slots=True)
class Conversations:
    """Tokens of all conversations of a file that fit into a sequence, in its order.

    Attributes:
        tokens: int32, of one after the other.
        learned: bool; which of them are an answer's, or end one.
        starts: int64, where each conversation begins in them; and its end.
    """

    path: Path
    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    too_long: TooLong

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Positions that each takes: every token but the last is followed by one that can be learned."""
        return np.diff(self.starts) - 1

    def describe_too_long(self, sequence_length: int) -> str:
        """What was left out; empty when nothing was."""
        left_out = self.too_long
        if not left_out.count:
            return ""
        return (
            f"{left_out.count} of {left_out.count + len(self)} conversations in {self.path} are LEFT OUT, longer than "
            f"data.sequence_length = {sequence_length} (the first in line {left_out.first_line}: "
            f"{left_out.first_length - 1})"
        )


def keep_conversations(
    path: Path, folder: Path, tokenizer: Tokenizer, template: ChatTemplate, sequence_length: int, *, field: str
) -> Path:
    """Encode a file's conversations, unless that was done; returns the folder that `map_conversations` reads.

    It is named after all that the tokens depend on, and gets that name when it is whole.

    Args:
        folder: where such folders are.
        field: that names the file, for messages.

    Raises:
        FieldError: the file cannot be read; a line is no conversation, or none that the template can write; or none
            is short enough. The message names the line.
    """
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FieldError(field, f"{path}: cannot be read ({error.strerror})") from error
    key = json.dumps([_VERSION, content, tokenizer.name, template.digest, sequence_length])
    whole = folder / hashlib.sha256(key.encode()).hexdigest()[:24]
    if whole.exists():
        return whole
    try:
        with written_aside(whole) as aside:
            _write(aside, path, template, sequence_length, field)
            with contextlib.suppress(OSError):  # another run of the same data was faster
                aside.replace(whole)
    except OSError as error:
        raise FieldError("data.folder", f"{whole} cannot be written ({error.strerror})") from error
    return whole


def map_conversations(path: Path, kept: Path) -> Conversations:
    """What `keep_conversations` left for a file.

    Raises:
        FieldError: something is missing or damaged there.
    """
    try:
        tokens, learned, starts = (
            np.load(kept / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("tokens", "learned", "starts")
        )
        too_long = TooLong(**json.loads((kept / "too_long.json").read_text()))
        is_whole = len(tokens) == len(learned) == starts[-1]
    except (OSError, ValueError, TypeError) as error:
        raise FieldError("data.folder", f"{kept} is damaged: remove it ({error})") from error
    if not is_whole:
        raise FieldError("data.folder", f"{kept} is damaged: remove it (its parts are of different lengths)")
    return Conversations(path, tokens, learned, starts, too_long)


def read_conversations(path: Path, *, field: str) -> Iterator[tuple[str, list[Message]]]:
    """The conversations of a .jsonl or .jsonl.gz in its order, each with its place; empty lines are none.

    Raises:
        FieldError: see `keep_conversations`.
    """
    try:
        for record in read_records([path]):
            if record.raw.strip():
                yield record.place, _messages_of(record)
    except UserError as error:
        raise FieldError(field, str(error)) from error


def _messages_of(record: Record) -> list[Message]:
    try:
        tree = json.loads(record.raw.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record.place}: not JSON ({error})") from error
    if not isinstance(tree, dict) or "messages" not in tree:
        hint = did_you_mean("messages", tree) if isinstance(tree, dict) else ""
        raise UserError(f"{record.place}: no JSON object with messages{hint}")
    try:
        messages = parse_messages(tree["messages"])
    except ChatError as error:
        raise UserError(f"{record.place}: {error}") from error
    if not has_answer(messages):
        raise UserError(f"{record.place}: no message of the assistant: there is nothing to learn")
    return messages


def _write(aside: Path, path: Path, template: ChatTemplate, sequence_length: int, field: str) -> None:
    tokens, learned, starts = array("i"), bytearray(), array("q", [0])
    too_long = TooLong()
    for place, messages in read_conversations(path, field=field):
        try:
            chat = template.encode(messages)
        except ChatError as error:
            raise FieldError(field, f"{place}: {error}") from error
        if not any(chat.learned[1:]):
            raise FieldError(field, f"{place}: the chat template writes no answer: there is nothing to learn")
        if len(chat.tokens) - 1 > sequence_length:
            line = too_long.first_line or int(place.rpartition(":")[2])
            too_long = TooLong(too_long.count + 1, line, too_long.first_length or len(chat.tokens))
            continue
        tokens.extend(chat.tokens)
        learned.extend(chat.learned)
        starts.append(len(tokens))
    if len(starts) == 1:
        why = (
            f": all {too_long.count} are longer than data.sequence_length = {sequence_length}" if too_long.count else ""
        )
        raise FieldError(field, f"{path} holds no conversation{why}")
    aside.mkdir()
    np.save(aside / "tokens.npy", np.frombuffer(tokens, dtype=np.int32), allow_pickle=False)
    np.save(aside / "learned.npy", np.frombuffer(learned, dtype=np.bool_), allow_pickle=False)
    np.save(aside / "starts.npy", np.frombuffer(starts, dtype=np.int64), allow_pickle=False)
    (aside / "too_long.json").write_text(json.dumps(asdict(too_long)))
