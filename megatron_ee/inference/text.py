"""Tokens into text, piece by piece: what is shown while a request is running, and, joined, what it has said."""

from collections.abc import Sequence

from megatron_ee.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_HELD = 3  # so many at a text's end may still become a character: some write one for each byte of its four
_WINDOW = 12  # tokens: these may be of three bytes each, and three more tell where characters begin


class Detokenizer:
    """Gives out text as soon as no later token can change it, at a cost that does not grow with the text.

    The pieces join to what the tokenizer makes of all tokens at once; but what was a whole character stays one, where a
    tokenizer would take it back for bytes beside it that are no text (byte fallback).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # from the last whole character on
        self._given = self._held = ""  # their text

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        if self._tokens and not self._tokenizer.decode([token]):
            return ""  # a special token within a character: decoders look past it, too
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.startswith(self._given):
            return self.finish() + self.add(token)
        whole = len(text.rstrip(_UNKNOWN))
        certain = max(whole, len(text) - _HELD)
        piece = text[len(self._given) : certain]
        self._given, self._held = text[:certain], text[certain:]
        if not self._held:
            self._restart()
        elif len(self._tokens) > _WINDOW and not self._forget():
            piece += self.finish()
        return piece

    def finish(self) -> str:
        """What was held back; no more tokens come."""
        held = self._held
        self._restart()
        return held

    def _forget(self) -> bool:
        """Keep the last tokens alone. They may begin within a character, so that their text begins otherwise than it
        did, but it is to end alike."""
        tokens = self._tokens[-_WINDOW:]
        text = self._tokenizer.decode(tokens)
        self._tokens, self._given = tokens, text[: len(text) - len(self._held)]
        return text.endswith(self._held)

    def _restart(self) -> None:
        self._tokens, self._given, self._held = [], "", ""


class _StopString:
    """One string that ends a text, looked for character by character (Knuth, Morris, Pratt 1977).

    Attributes:
        size: how much of it the text ends with; less than all.
    """

    def __init__(self, text: str) -> None:
        self.text, self.size = text, 0
        self._shorter = [0] * (len(text) + 1)  # how much of it its first n characters end with, other than all n
        for place in range(1, len(text)):
            self._shorter[place + 1] = self._longer(self._shorter[place], text[place])

    def follow(self, character: str) -> bool:
        """Whether this character completes it."""
        self.size = self._longer(self.size, character)
        if self.size < len(self.text):
            return False
        self.size = self._shorter[self.size]
        return True

    def _longer(self, size: int, character: str) -> int:
        while size and self.text[size] != character:
            size = self._shorter[size]
        return size + (self.text[size] == character)


class TextStream:
    """An answer's text, until a stop string ends it. What may be the beginning of one is held back until that is known.

    Which one ends the text doesn't depend on how it is split into tokens: the first to be complete, of several the
    longest.

    Attributes:
        stop: the stop string that has ended the text, which is no part of it; None as yet.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, min_new_tokens: int = 0) -> None:
        """
        Args:
            stops: none of them empty.
            min_new_tokens: a stop string that is complete with fewer tokens ends nothing.
        """
        assert all(stops), "an empty stop string"
        self.stop: str | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = [_StopString(text) for text in sorted(set(stops), key=len, reverse=True)]
        self._too_early = min_new_tokens
        self._held = ""

    def add(self, token: int) -> str:
        """The next token's text, as far as it is certain, with what was held back before. Stop tokens have none: they
        are not added."""
        assert self.stop is None, "the text has ended"
        self._too_early -= 1
        return self._pass(self._detokenizer.add(token))

    def finish(self) -> str:
        """What is held back; no more tokens come. This, too, may complete a stop string."""
        if self.stop is not None:
            return ""
        piece = self._pass(self._detokenizer.finish())
        piece, self._held = piece + self._held, ""
        return piece

    def _pass(self, text: str) -> str:
        if not self._stops:
            return text
        before, self._held = self._held, ""
        for number, character in enumerate(text, 1):
            complete = [stop for stop in self._stops if stop.follow(character)]
            if complete and self._too_early <= 0:
                self.stop = complete[0].text
                return (before + text[:number])[: -len(self.stop)]
        text = before + text
        certain = len(text) - max(stop.size for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]
