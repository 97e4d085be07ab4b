"""The tokenizer that needs no file."""

from collections.abc import Iterator, Mapping

from megatron_ee.tokenizer.special import SpecialToken

_EOD = "<|endoftext|>"  # as templates spell it

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""Each message is its role on a line, its content, and the end-of-document token; nothing stands between messages."""


class ByteTokenizer:
    """One token a byte of UTF-8, and two specials."""

    name = "bytes"
    vocab_size = 258
    eod = 256
    pad = 257
    begin: tuple[int, ...] = ()
    special_tokens: Mapping[str, SpecialToken] = {_EOD: SpecialToken(eod)}
    named_tokens: Mapping[str, str] = {"eos_token": _EOD}
    chat_template: str | None = CHAT_TEMPLATE

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes."""
        return list(text.encode())

    def encode_within(self, text: str) -> list[int]:
        return self.encode(text)

    def pieces(self, text: str, size: int = 1 << 16) -> Iterator[str]:
        """Any cut will do."""
        return (text[start : start + size] for start in range(0, len(text), size))

    def decode(self, tokens: list[int]) -> str:
        """The text of the bytes among the tokens; what is no valid UTF-8 becomes U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def files(self) -> Mapping[str, bytes]:
        return {}
