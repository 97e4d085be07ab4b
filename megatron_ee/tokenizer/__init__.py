"""Text to token ids and back."""

import os.path
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from megatron_ee.errors import FieldError, UserError
from megatron_ee.tokenizer.byte import ByteTokenizer
from megatron_ee.tokenizer.huggingface import NO_PAD, open_huggingface, train_bpe
from megatron_ee.tokenizer.special import SpecialToken

__all__ = [
    "BYTES",
    "NO_PAD",
    "ByteTokenizer",
    "SpecialToken",
    "Tokenizer",
    "open_tokenizer",
    "padded_vocab_size",
    "train_bpe",
]

BYTES = ByteTokenizer.name


class Tokenizer(Protocol):
    """What the rest of the system needs of a tokenizer.

    Attributes:
        name: says which tokenizer this is, by content and not by path: datasets, index caches and checkpoints keep it.
        vocab_size: above every token id.
        eod: ends a document. It never comes out of a text, whatever the text says.
        pad: fills a sequence and is never learned; NO_PAD, which is no token, where the tokenizer has none of its own.
        begin: what Hugging Face's own tokenizer writes before every text, as <|begin_of_text|>; `encode` doesn't.
        special_tokens: spelling -> token, of those that never come out of a text; a chat template writes them.
        named_tokens: role -> spelling, as in eos_token: what a chat template calls them.
        chat_template: how it writes conversations, a Jinja program (see `chat`); None where it doesn't say.
    """

    name: str
    vocab_size: int
    eod: int
    pad: int
    begin: tuple[int, ...]
    special_tokens: Mapping[str, SpecialToken]
    named_tokens: Mapping[str, str]
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with nothing added before or after."""
        ...

    def encode_within(self, text: str) -> list[int]:
        """The tokens of a text that comes after others: `encode`, without what a tokenizer does to a first word."""
        ...

    def pieces(self, text: str) -> Iterator[str]:
        """A long text, cut where that changes no token: `encode` makes the same of the pieces as of the whole."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text that these tokens add to the text before them; special tokens add none.

        Parts join to the whole: decode(a + b) is decode(a) + decode(b) wherever `a` ends with a whole character.
        """
        ...

    def files(self) -> Mapping[str, bytes]:
        """File name -> content: in a folder of their own they are this tokenizer again. Empty when it needs none."""
        ...


def open_tokenizer(source: str, *, field: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer that a config or a command line names.

    Args:
        source: `bytes`, a tokenizer.json, or the folder of a Hugging Face tokenizer.
        field: where it was named, for messages.

    Raises:
        FieldError: it is not there, cannot be read, lacks an end-of-document token, or its library isn't installed.
    """
    if source == BYTES:
        return ByteTokenizer()
    if not os.path.exists(source):  # unlike pathlib's, false for what cannot be a path
        raise FieldError(
            field, f"{source!r} is neither {BYTES!r} nor the path of a tokenizer.json or of a tokenizer's folder"
        )
    try:
        return open_huggingface(Path(source))
    except UserError as error:
        raise FieldError(field, str(error)) from error


def padded_vocab_size(tokenizer: Tokenizer, multiple: int = 64) -> int:
    """The tokenizer's vocabulary, rounded up so that matrix products are of even shape and split over ranks."""
    return -(-tokenizer.vocab_size // multiple) * multiple
