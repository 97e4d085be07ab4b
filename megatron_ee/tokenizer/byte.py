"""The tokenizer that needs no file."""

from collections.abc import Iterator, Mapping


class ByteTokenizer:
    """One token a byte of UTF-8, and two specials."""

    name = "bytes"
    vocab_size = 258
    eod = 256
    pad = 257

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes."""
        return list(text.encode())

    def pieces(self, text: str, size: int = 1 << 16) -> Iterator[str]:
        """Any cut will do."""
        return (text[start : start + size] for start in range(0, len(text), size))

    def decode(self, tokens: list[int]) -> str:
        """The text of the bytes among the tokens; what is no valid UTF-8 becomes U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def files(self) -> Mapping[str, bytes]:
        return {}
