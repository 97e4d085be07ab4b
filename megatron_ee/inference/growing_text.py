"""One prompt's text, as its tokens come. Imports no torch."""

from megatron_ee.inference.completion import Piece
from megatron_ee.inference.request import Emission, Request
from megatron_ee.tokenizer import Tokenizer


class GrowingText:
    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self._index, self._request, self._tokenizer = index, request, tokenizer
        self._held: list[int] = []

    def take(self, emission: Emission) -> Piece:
        if emission.finish == "stop":
            return Piece(self._index, "", emission, "stop", emission.token)
        self._held.append(emission.token)
        text = self._tokenizer.decode(self._held)
        if text.endswith("\ufffd") and len(self._held) < 4 and not emission.finish:
            return Piece(self._index, "", emission)
        self._held.clear()
        return Piece(self._index, text, emission, emission.finish)
