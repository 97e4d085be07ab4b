"""How many rows the embedding and the output projections have."""

from megatron_ee.config import ModelConfig
from megatron_ee.errors import FieldError
from megatron_ee.tokenizer import Tokenizer, padded_vocab_size


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
