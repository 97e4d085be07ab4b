"""Hides special tokens that a message spells out, so that a rendered conversation has none but its template's."""

import re
from collections.abc import Collection, Iterable
from itertools import chain

BEGIN, END = "\U0010fffd", "\U0010fffc"  # around what is learned; in a message they are hidden like special tokens

_PRIVATE = range(0x10FFFB, 0xF0000, -1)  # characters that Unicode leaves without a meaning


class SpecialSpellings:
    """How special tokens are spelled.

    Attributes:
        pattern: finds them in a text, the longest at a place, as tokenizers do.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.pattern = _any_of(names)
        self._starts = re.compile(f"(?={_any_of([*names, BEGIN, END]).pattern})")
        self._beginnings = {name[:size] for name in names for size in range(1, len(name))}
        self._endings = {name[size:] for name in names for size in range(1, len(name))}
        self._names = tuple(names)
        self._longest = max(map(len, names), default=0)

    def places_in(self, text: str) -> set[int]:
        """Characters without which no special token is left in the text, nor comes to be where it meets others, with
        its outer blanks or without."""
        places = {match.start() for match in self._starts.finditer(text)}
        inner = text.strip()
        if inner:
            first = text.index(inner)
            last, sizes = first + len(inner) - 1, range(1, min(len(inner), self._longest) + 1)
            if any(inner[-size:] in self._beginnings for size in sizes):
                places.add(last)
            if any(inner[:size] in self._endings for size in sizes) or any(inner in name for name in self._names):
                places.add(first)
        return places


class Disguise:
    """Puts private characters for those that make a special token, and takes them back.

    Args:
        used: texts whose own private characters are left alone.
    """

    def __init__(self, spellings: SpecialSpellings, used: Iterable[str]) -> None:
        own = {char for char in chain.from_iterable(used) if ord(char) > _PRIVATE.stop}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in own)
        self._spellings = spellings
        self._stand_ins: dict[str, str] = {}
        self._behind: dict[int, str] = {}

    def put_on(self, text: str) -> str:
        """A text of the same length that spells no special token."""
        places = self._spellings.places_in(text)
        return "".join(self._stand_in(char) if i in places else char for i, char in enumerate(text)) if places else text

    def take_off(self, text: str) -> str:
        """What any part of a disguised text was."""
        return text.translate(self._behind) if self._behind else text

    def _stand_in(self, char: str) -> str:
        if char not in self._stand_ins:
            self._stand_ins[char] = next(self._free)
            self._behind[ord(self._stand_ins[char])] = char
        return self._stand_ins[char]


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
