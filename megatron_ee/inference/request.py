"""What goes into decoding and what comes out: the two types that all callers share."""

from dataclasses import dataclass

from megatron_ee.config import ExitParams


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue.

    Attributes:
        prompt: token ids, at least one.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest tokens; 0: all.
        stop: the token that ends the text; it is not emitted.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: int
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0
    exit: ExitParams = ExitParams()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("request.prompt: needs one token at least")


@dataclass(frozen=True, slots=True)
class Emission:
    """One new token.

    Attributes:
        exit_layer: number of layers run for it; the model's number of layers at full depth.
        confidence: the exit's, in [0, 1]; 1 where no exit was asked.
    """

    token: int
    exit_layer: int
    confidence: float
