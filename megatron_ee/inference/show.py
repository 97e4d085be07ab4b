"""Texts for people: coloured by depth on a terminal, with what the exits saved. Imports no torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ee.config import ExitParams
from megatron_ee.inference.completion import drafts_of
from megatron_ee.inference.request import Emission
from megatron_ee.inference.savings import Savings

_SHALLOW_TO_DEEP = (46, 154, 226, 214, 208, 196)  # xterm's 256 colours, green to red


class DepthPainter:
    """Colours text by the number of layers run for it.

    Args:
        depths: all layers after which a token may leave, ascending, the last one being full depth (never coloured).
        colour: whether the output is a terminal that wants colour; plain text otherwise.
    """

    def __init__(self, depths: Sequence[int], *, colour: bool) -> None:
        self._colour = colour
        early = depths[:-1]
        last = len(_SHALLOW_TO_DEEP) - 1
        self._colours = {
            layer: _SHALLOW_TO_DEEP[number * last // max(1, len(early) - 1)] for number, layer in enumerate(early)
        }

    def paint(self, text: str, emission: Emission) -> str:
        """A text of several tokens (a character may be) is given the last one's depth; a token that an exit drafted,
        that exit's."""
        return self._in_colour(text, emission.draft_exit or emission.exit_layer)

    def legend(self) -> str:
        """Which colour is which depth; empty without colour."""
        if not self._colour:
            return ""
        names = [self._in_colour(f"exit {layer}", layer) for layer in self._colours]
        return "  ".join([*names, "full depth"])

    def _in_colour(self, text: str, layer: int) -> str:
        if not text or not self._colour or layer not in self._colours:
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

    def exits_used(self) -> str:
        """Tokens by the number of layers run for them."""
        used = Counter(emission.exit_layer for emission in self.emissions)
        return ", ".join(f"{layer}: {count}" for layer, count in sorted(used.items()))

    def drafts(self) -> str:
        """What became of drafted tokens; empty where there are none."""
        drafts = drafts_of(self.emissions)
        if drafts.acceptance is None:
            return ""
        tokens = len(self.emissions)
        each = tokens / max(1, tokens - drafts.accepted)
        return f"{drafts.drafted}, {drafts.acceptance:.1%} of them accepted; {each:.2f} tokens for each of full depth's"

    def line(self, num_layers: int) -> str:
        return (
            f"{len(self.emissions)} tokens, mean depth {self.mean_depth:.2f} of {num_layers} layers, "
            f"tokens by exit layer {{{self.exits_used()}}}, {self.tokens_per_second:.1f} tokens/s"
            + (f", drafted {drafts}" if (drafts := self.drafts()) else "")
        )


_EXACT = "Every position runs every layer in the end; saved are those that still waited when their text ended."
_PROPAGATED = "Skipped layers get keys and values of the state at the exit: cheap, and not exact."
_VERIFIED = "Full depth has verified every token: the texts are its own."
_CORRECTED = "Every token runs every layer, and the exits correct what full depth says."
_FULL = "Every token runs every layer."


def closing_line(params: ExitParams) -> str:
    """What there is to know of the way in which texts were decoded."""
    if params.mode == "early_exit":
        return _PROPAGATED if params.kv_policy == "propagate" else _EXACT
    return {"full": _FULL, "speculative": _VERIFIED, "sled": _CORRECTED, "dola": _CORRECTED}[params.mode]


def closing_table(
    summary: Summary, savings: Savings, params: ExitParams, *, num_texts: int, num_layers: int
) -> Iterator[str]:
    """The lines that close texts: what exits saved, and what they cost."""
    waited = summary.mean_depth / num_layers
    rows = {
        "tokens": f"{len(summary.emissions)} in {num_texts} text{'s' * (num_texts != 1)}, "
        f"{summary.tokens_per_second:.1f} tokens/s",
        "mean depth": f"{summary.mean_depth:.2f} of {num_layers} layers",
        "tokens by exit layer": summary.exits_used(),
        "layers not waited for": f"{1 - waited:.1%}",
        "weight bytes not read": f"{savings.share_not_read:.1%} of the layers', "
        f"{_bytes(savings.bytes_not_read)} of {_bytes(savings.bytes_at_full_depth)} (prompts too)",
        "exits' heads": f"asked {savings.num_asked} times; {_bytes(savings.head_bytes)} read beyond full depth's "
        f"({savings.head_share:.1%}), {savings.head_arithmetic:.1%} more arithmetic",
        "arithmetic saved": f"{savings.arithmetic_saved:.1%} of the layers'",
    }
    if drafts := summary.drafts():
        rows["drafted tokens"] = drafts
    for name, value in rows.items():
        yield f"{name:<23}{value}"
    yield closing_line(params)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
