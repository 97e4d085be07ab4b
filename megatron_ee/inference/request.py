"""What goes into decoding and what comes out: the types that all callers share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_ee.config import ExitParams, SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue.

    Attributes:
        prompt: token ids, at least one.
        stop_token_ids: the model's own stop tokens; `sampling` may name more, or ignore these.
        seed: of its random numbers, where `sampling` names none.
        prompt_logprobs: have its prompt's tokens scored, with so many of the likeliest ones beside each; see `Scores`.
            Such a prompt runs to full depth: no exit lets its last position out, so that the first new token is one of
            full depth, as are its log-probabilities by exit. None: not wanted.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    exit: ExitParams = ExitParams()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("request.prompt: needs one token at least")
        if self.prompt_logprobs is not None and self.prompt_logprobs < 0:
            raise ValueError(f"request.prompt_logprobs: {self.prompt_logprobs} is below 0")

    @property
    def stops(self) -> frozenset[int]:
        """Every token that ends the text."""
        own = () if self.sampling.ignore_eos else self.stop_token_ids
        return frozenset((*own, *self.sampling.stop_token_ids))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log-probabilities by an exit's logits as they are, before any sampling setting.

    Attributes:
        token: of the chosen token.
        top: token id -> log-probability of the likeliest ones, descending.
    """

    token: float
    top: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of a prompt, by full depth's logits as they are: said once, before the first new token.

    Attributes:
        logprobs: of each of its tokens from the second on, given all before it; of the first one nothing is said.
    """

    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class Emission:
    """One new token.

    Attributes:
        exit_layer: number of layers run for it; the model's number of layers at full depth.
        confidence: the exit's, in [0, 1]; 1 where no exit was asked.
        logprobs: by the exit that spoke, if asked for.
        exit_logprobs: layer -> the same by every exit that the token passed, if asked for; the one that spoke is last.
        finish: why the text ends with it: `stop`: it is a stop token, which is no part of the text; `length`: it is
            the last one that the request or the model allows. None: the text goes on.
        draft_exit: the exit that proposed it, which full depth accepted; None: nobody did.
        discarded: drafted tokens that full depth did not accept, of which it stands in the first one's place.
    """

    token: int
    exit_layer: int
    confidence: float
    logprobs: Logprobs | None = None
    exit_logprobs: Mapping[int, Logprobs] | None = None
    finish: FinishReason | None = None
    draft_exit: int | None = None
    discarded: int = 0

    @property
    def drafted(self) -> bool:
        """Whether an exit proposed it."""
        return self.draft_exit is not None


@dataclass(frozen=True, slots=True)
class Failure:
    """A text that ends before its end.

    Attributes:
        reason: for its reader: what went wrong.
    """

    reason: str


Reply = Scores | Emission | Failure
"""What is said of a request: the scores of its prompt, if it wants them, and then its tokens."""
