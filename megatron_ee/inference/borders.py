"""Where a model's texts begin and end: what its folder says beside its tokenizer. Imports no torch."""

from pathlib import Path

from megatron_ee.checkpoint.folders import is_huggingface
from megatron_ee.huggingface.generation import end_tokens
from megatron_ee.tokenizer import Tokenizer


def stop_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a text: the tokenizer's end-of-document token, and what a Hugging Face folder names beside it. Tokens
    that the tokenizer doesn't have are never chosen, and left out.

    Raises:
        UserError: generation_config.json or config.json is damaged.
    """
    named = end_tokens(folder) if is_huggingface(folder) else ()
    return tuple(dict.fromkeys(token for token in (tokenizer.eod, *named) if token < tokenizer.vocab_size))


def tokens_before_text(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What comes before a prompt that is a text: in a Hugging Face folder, what its tokenizer writes there. A model
    that was trained here has seen documents as they are, each after the end of another."""
    return tokenizer.begin if is_huggingface(folder) else ()
