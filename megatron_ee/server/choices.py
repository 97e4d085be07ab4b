"""One text of an answer: what of it is new, and all of it, as JSON. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ee.inference.completion import Piece, drafts_of
from megatron_ee.inference.request import Emission, FinishReason, Logprobs, Scores
from megatron_ee.inference.text import Detokenizer
from megatron_ee.server.protocol.logprobs import LogprobsStyle, Told, token_text
from megatron_ee.tokenizer import Tokenizer


@dataclass(slots=True)
class Echo:
    """A prompt that comes before its answer.

    Attributes:
        text: as it was sent.
        tokens: as the model got them.
        has_scores: its log-probabilities are told, too.
    """

    text: str
    tokens: Sequence[int]
    has_scores: bool


@dataclass(slots=True)
class Choice:
    """
    Attributes:
        index: in the answer.
        style: of log-probabilities; None: they are not asked for.
        hides_answer: no new token was asked for; the one that every request gets is not told.
    """

    index: int
    tokenizer: Tokenizer
    style: LogprobsStyle | None
    echo: Echo | None = None
    hides_answer: bool = False
    finish_reason: FinishReason | None = None
    emissions: list[Emission] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _told: list[Told] = field(default_factory=list)
    _length: int = 0
    _sent: int = 0
    _sent_told: int = 0

    def hear(self, said: Piece | Scores) -> None:
        """Scores come before any piece."""
        if isinstance(said, Scores):
            assert self.echo is not None
            self._begin_with(self.echo, said.logprobs)
            return
        if self.echo is not None and not self._texts:
            self._begin_with(self.echo, None)
        self.finish_reason = said.finish_reason
        if self.hides_answer:
            self.finish_reason = "length"
            return
        self.emissions.append(said.emission)
        if self.style is not None and said.emission.finish != "stop":
            assert said.emission.logprobs is not None
            self._tell(said.emission.token, said.emission.logprobs)
        self._add(said.text)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def logprobs(self) -> dict[str, Any] | None:
        return None if self.style is None else self.style.body(self._told)

    def depths(self) -> dict[str, Any]:
        """What the exits did, token by token."""
        drafted = [emission.draft_exit for emission in self.emissions]
        return {
            "exit_layers": [emission.exit_layer for emission in self.emissions],
            "confidences": [emission.confidence for emission in self.emissions],
            "draft_exits": drafted if any(drafted) else None,
            **self._summary(),
        }

    def news(self) -> tuple[str, dict[str, Any] | None, dict[str, Any]] | None:
        """What of it has not been told by this: text, log-probabilities, and the depth of each token. None: as yet
        nothing that can be shown."""
        texts = self._texts[self._sent :]
        if not any(texts) and self.finish_reason is None:
            return None
        told, self._sent_told = self._told[self._sent_told :], len(self._told)
        first, self._sent = self._sent, len(self._texts)
        depths: dict[str, Any] = {"tokens": self._depths_of(texts, first)}
        if self.finish_reason is not None:
            depths |= self._summary()
        return "".join(texts), None if self.style is None else self.style.body(told), depths

    def _depths_of(self, texts: Sequence[str], first: int) -> list[dict[str, Any]]:
        """Of the tokens that these texts are of; a prompt has none."""
        skipped = self.echo is not None
        tokens = []
        for number, text in enumerate(texts, first):
            if skipped and number == 0:
                continue
            emission = self.emissions[number - skipped]
            tokens.append(
                {
                    "text": text,
                    "exit_layer": emission.exit_layer,
                    "confidence": emission.confidence,
                    "drafted": emission.drafted,
                }
            )
        return tokens

    def _summary(self) -> dict[str, Any]:
        layers = [emission.exit_layer for emission in self.emissions]
        return {
            "mean_depth": sum(layers) / len(layers) if layers else None,
            "acceptance": drafts_of(self.emissions).acceptance,
        }

    def _begin_with(self, echo: Echo, scores: Sequence[Logprobs] | None) -> None:
        if self.style is not None:
            text = Detokenizer(self.tokenizer)
            for place, token in enumerate(echo.tokens):
                self._tell(token, scores[place - 1] if place and scores is not None else None)
                self._length += len(text.add(token))
        self._length = 0
        self._add(echo.text)

    def _tell(self, token: int, logprobs: Logprobs | None) -> None:
        self._told.append(Told(token, token_text(token, self.tokenizer), logprobs, self._length))

    def _add(self, text: str) -> None:
        self._texts.append(text)
        self._length += len(text)
