"""What clients of a server have heard: an answer's texts, and counts of all that came."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """
    Attributes:
        outcomes: of answers, whole or not, by what ended them.
        refused: by code.
        left: requests that their client gave up, of whose end it knows nothing.
        layers: tokens received, by the layers run for them.
        unseen: tokens that a client knows of, but does not get: of answers that are none.
        asked, said: how often each question was answered that has one answer only, and what was said.
        faults: what nobody may ever see.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    left: int = 0
    layers: Counter[int] = field(default_factory=Counter)
    unseen: int = 0
    drafted: int = 0
    accepted: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    said: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.outcomes += other.outcomes
        self.refused += other.refused
        self.layers += other.layers
        self.asked += other.asked
        for name in ("left", "unseen", "drafted", "accepted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for question, texts in other.said.items():
            self.said[question] |= texts
        self.faults += other.faults

    @property
    def completed(self) -> int:
        return self.outcomes["stop"] + self.outcomes["length"]

    @property
    def num_in_the_dark(self) -> int:
        """Requests of which the server may have said more than anybody has heard."""
        return self.left + self.outcomes["timeout"]


@dataclass
class Heard:
    """One text of an answer, and the layers run for its tokens."""

    text: str = ""
    layers: list[int] = field(default_factory=list)
    confidences: int = 0
    finish: str | None = None


def whole_choices(answer: Mapping[str, Any]) -> dict[int, Heard]:
    choices = {}
    for choice in answer["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        depths = choice["early_exit"]
        heard = Heard(text, depths["exit_layers"], len(depths["confidences"]), choice["finish_reason"])
        choices[choice["index"]] = heard
    return choices


def streamed_choices(pieces: Iterable[Mapping[str, Any]]) -> tuple[dict[int, Heard], Mapping[str, Any] | None]:
    choices: dict[int, Heard] = defaultdict(Heard)
    usage = None
    for piece in pieces:
        usage = piece.get("usage") or usage
        for choice in piece["choices"]:
            heard = choices[choice["index"]]
            assert heard.finish is None, "more of a text that has ended"
            heard.text += choice["text"] if "text" in choice else choice["delta"]["content"]
            tokens = choice["early_exit"]["tokens"]
            heard.layers += [token["exit_layer"] for token in tokens]
            heard.confidences += sum("confidence" in token for token in tokens)
            heard.finish = choice["finish_reason"]
    return choices, usage
