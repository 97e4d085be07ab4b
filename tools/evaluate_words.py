"""Between texts and tokens, as tasks need it."""

from typing import NamedTuple

from megatron_ee.tokenizer import Tokenizer


class Words(NamedTuple):
    """Between texts and tokens.

    Attributes:
        begin: tokens that come before a text.
    """

    tokenizer: Tokenizer
    begin: tuple[int, ...]

    def encode(self, text: str, *, with_begin: bool = True) -> list[int]:
        return [*(self.begin if with_begin else ()), *self.tokenizer.encode(text)]

    @property
    def prefix(self) -> int:
        """What comes before a text that has nothing before it: the token that begins texts, or ends documents."""
        tokenizer = self.tokenizer
        bos = tokenizer.special_tokens.get(tokenizer.named_tokens.get("bos_token", ""))
        return tokenizer.eod if bos is None else bos.id

    @property
    def end(self) -> str:
        """How the token that ends documents is spelled."""
        tokenizer = self.tokenizer
        spellings = {of.id: name for name, of in tokenizer.special_tokens.items()}
        return spellings.get(tokenizer.eod) or tokenizer.named_tokens["eos_token"]
