"""Emissions as text for people: coloured by depth on a terminal, with what the exits saved."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.inference.request import Emission
from megatron_ee.tokenizer import Tokenizer

_SHALLOW_TO_DEEP = (46, 154, 226, 214, 208, 196)  # xterm's 256 colours, green to red


class DepthPainter:
    """Turns emissions into printable text, token by token.

    Args:
        depths: all layers after which a token may leave, ascending, the last one being full depth (never coloured).
        colour: whether the output is a terminal that wants colour; plain text otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, depths: Sequence[int], *, colour: bool) -> None:
        self._tokenizer, self._colour = tokenizer, colour
        early = depths[:-1]
        last = len(_SHALLOW_TO_DEEP) - 1
        self._colours = {
            layer: _SHALLOW_TO_DEEP[number * last // max(1, len(early) - 1)] for number, layer in enumerate(early)
        }
        self._incomplete: list[int] = []

    def paint(self, emission: Emission) -> str:
        """The text that this token completes; a character of several tokens has the last one's colour."""
        self._incomplete.append(emission.token)
        text = self._tokenizer.decode(self._incomplete)
        if text.endswith("\ufffd") and len(self._incomplete) < 4:
            return ""
        self._incomplete.clear()
        return self._in_colour(text, emission.exit_layer)

    def legend(self) -> str:
        """Which colour is which depth; empty without colour."""
        if not self._colour:
            return ""
        names = [self._in_colour(f"exit {layer}", layer) for layer in self._colours]
        return "  ".join([*names, "full depth"])

    def _in_colour(self, text: str, layer: int) -> str:
        if not self._colour or layer not in self._colours:
            return text
        return f"\x1b[38;5;{self._colours[layer]}m{text}\x1b[0m"


@dataclass(frozen=True, slots=True)
class Summary:
    """What decoding did, over one text or several."""

    emissions: Sequence[Emission]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.emissions) / self.seconds

    @property
    def mean_depth(self) -> float:
        """Layers run for a token, on average (layers that a pending position runs later are not counted)."""
        return sum(emission.exit_layer for emission in self.emissions) / len(self.emissions)

    def exits_used(self) -> dict[int, int]:
        """Tokens by the number of layers run for them."""
        return dict(sorted(Counter(emission.exit_layer for emission in self.emissions).items()))

    def line(self, num_layers: int) -> str:
        if not self.emissions:
            return "no tokens: the text ended at once"
        used = ", ".join(f"{layer}: {count}" for layer, count in self.exits_used().items())
        return (
            f"{len(self.emissions)} tokens, mean depth {self.mean_depth:.2f} of {num_layers} layers, "
            f"tokens by exit layer {{{used}}}, {self.tokens_per_second:.1f} tokens/s"
        )
