"""How many rows the embedding and the output projections have."""

from pathlib import Path

from megatron_ee.config import Config, ModelConfig
from megatron_ee.errors import FieldError
from megatron_ee.tokenizer import Tokenizer, open_tokenizer, padded_vocab_size


def resolve_vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """The model's vocabulary: the config's number, or the tokenizer's, padded.

    Raises:
        FieldError: the config's number cannot hold the tokenizer's tokens.
    """
    if model.vocab_size == "auto":
        return padded_vocab_size(tokenizer)
    if model.vocab_size < tokenizer.vocab_size:
        raise FieldError(
            "model.vocab_size", f"{model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens"
        )
    return model.vocab_size


def planned_vocab_size(config: Config) -> int:
    """`resolve_vocab_size` for looking at a config where its data may be missing: then its number counts, unchecked.

    Raises:
        FieldError: see `resolve_vocab_size`; or there is no such tokenizer, and no number either.
    """
    number, tokenizer = config.model.vocab_size, config.data.tokenizer
    if number != "auto" and tokenizer != "bytes" and not Path(tokenizer).exists():
        return number
    return resolve_vocab_size(config.model, open_tokenizer(tokenizer))
