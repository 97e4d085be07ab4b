"""Text to token ids and back."""

from typing import Protocol


class Tokenizer(Protocol):
    """What the rest of the system needs of a tokenizer.

    `eod` ends a document; `pad` fills a sequence and is never learned.
    """

    vocab_size: int
    eod: int
    pad: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """One token a byte of UTF-8, and two specials."""

    vocab_size = 258
    eod = 256
    pad = 257

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """The text of the bytes among the tokens; what is no valid UTF-8 becomes U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a config names."""
    assert name == "bytes", "the config allows no other"
    return ByteTokenizer()


def padded_vocab_size(tokenizer: Tokenizer, multiple: int = 64) -> int:
    """The tokenizer's vocabulary, rounded up so that matrix products are of even shape and split over ranks."""
    return -(-tokenizer.vocab_size // multiple) * multiple
