"""What of a request's sampling can only be checked beside a model."""

from collections.abc import Iterable

from megatron_ee.config import SamplingParams
from megatron_ee.errors import FieldError

_SEEDS = 2**64


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """
    Raises:
        FieldError: a token is beyond the vocabulary, or the seed has more than 64 bits.
    """
    _check_tokens("logit_bias", params.logit_bias, vocab_size)
    _check_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
    if params.seed is not None and params.seed >= _SEEDS:
        raise _wrong("seed", f"{params.seed} has more than 64 bits")


def _check_tokens(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    for token in tokens:
        if token >= vocab_size:
            raise _wrong(name, f"{token} is no token: the vocabulary ends at {vocab_size - 1}")


def _wrong(name: str, message: str) -> FieldError:
    return FieldError(f"inference.sampling.{name}", message)
