"""One prompt's text, as its tokens come. Imports no torch."""

from megatron_ee.inference.completion import Piece
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.text import TextStream
from megatron_ee.tokenizer import Tokenizer


class GrowingText:
    """
    Attributes:
        index: of the prompt, among those of the call.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index, sampling = index, request.sampling
        self._stream = TextStream(tokenizer, sampling.stop, min_new_tokens=sampling.min_new_tokens)

    def take(self, emission: Emission) -> Piece:
        """What a new token adds. A stop string may be found only when no more tokens come; it ended the text then."""
        stream = self._stream
        text = "" if emission.finish == "stop" else stream.add(emission.token)
        if emission.finish is not None:
            text += stream.finish()
        if stream.stop is not None:
            return Piece(self.index, text, emission, "stop", stream.stop)
        stop_token = emission.token if emission.finish == "stop" else None
        return Piece(self.index, text, emission, emission.finish, stop_token)
