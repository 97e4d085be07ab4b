"""What `LLM` gives back: texts as they grow, and whole ones. Imports no torch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ee.inference.request import Emission, FinishReason, Request


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to a text.

    Attributes:
        index: of the prompt, among those of the call.
        text: what may be shown of it by now. It may be empty: a character is not whole yet, or a stop string may have
            begun; then a later piece has it.
        finish_reason: why the text ends with this piece; None: it goes on.
        stop_reason: the token or the string that it stops at.
    """

    index: int
    text: str
    emission: Emission
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt's whole text.

    Attributes:
        prompt: its tokens, as the model got them.
        text: without the stop token or the stop string.
        emissions: one for each new token, a stop token included.
        finish_reason: `stop` or `length`.
        stop_reason: the token or the string that it stops at; None with `length`.
    """

    prompt: tuple[int, ...]
    text: str
    emissions: tuple[Emission, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None

    @property
    def tokens(self) -> list[int]:
        """The new ones; a stop token is the last of them."""
        return [emission.token for emission in self.emissions]

    @property
    def exit_layers(self) -> list[int]:
        """Number of layers run for each token."""
        return [emission.exit_layer for emission in self.emissions]

    @property
    def confidences(self) -> list[float]:
        """Of the exit that each token left at; 1 where no exit was asked."""
        return [emission.confidence for emission in self.emissions]

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that full depth accepted; None: nothing was drafted."""
        return drafts_of(self.emissions).acceptance

    @property
    def mean_depth(self) -> float:
        """Layers run for a token, on average."""
        return sum(self.exit_layers) / len(self.emissions)


class Drafts(NamedTuple):
    """What became of drafted tokens."""

    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float | None:
        """The share that full depth accepted; None: nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None


def drafts_of(emissions: Iterable[Emission]) -> Drafts:
    """Over all of these tokens."""
    accepted = discarded = 0
    for emission in emissions:
        accepted += emission.drafted
        discarded += emission.discarded
    return Drafts(accepted + discarded, accepted)


def completions(requests: Sequence[Request], pieces: Iterable[Piece]) -> Iterator[tuple[int, Completion]]:
    """Texts as they become whole, each with the index of its prompt."""
    growing: dict[int, list[Piece]] = {}
    for piece in pieces:
        parts = growing.setdefault(piece.index, [])
        parts.append(piece)
        if piece.finish_reason is not None:
            yield (
                piece.index,
                Completion(
                    requests[piece.index].prompt,
                    "".join(part.text for part in parts),
                    tuple(part.emission for part in parts),
                    piece.finish_reason,
                    piece.stop_reason,
                ),
            )
            del growing[piece.index]


def in_order(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces, text after text as the prompts are: the first one's as they come, others' when their turn is."""
    waiting: dict[int, list[Piece]] = {}
    turn = 0
    for piece in pieces:
        waiting.setdefault(piece.index, []).append(piece)
        while turn in waiting:
            parts = waiting.pop(turn)
            yield from parts
            if parts[-1].finish_reason is None:
                break
            turn += 1
