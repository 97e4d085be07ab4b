"""A server that is asked instead of a model in process: what it is called, and what it makes of texts."""

import json
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

from evaluate_words import Words

from megatron_ee.checkpoint.description import read_description
from megatron_ee.checkpoint.folders import is_huggingface
from megatron_ee.checkpoint.models import has_tokenizer
from megatron_ee.config import Config
from megatron_ee.errors import FieldError
from megatron_ee.inference.borders import tokens_before_text
from megatron_ee.tokenizer import Tokenizer, open_tokenizer

_SECONDS = 10.0


class Served(NamedTuple):
    """
    Attributes:
        url: without a slash at its end.
        model: what the server calls it.
        exits: the layers after which it has early exits.
        max_length: positions of a text.
        concurrent: requests at a time.
    """

    url: str
    model: str
    words: Words
    exits: tuple[int, ...]
    max_length: int
    concurrent: int = 4


def reach(url: str, folder: Path, config: Config) -> Served:
    """
    Args:
        folder: the checkpoint that the server has, whose tokenizer makes the tokens that are sent.

    Raises:
        FieldError: no server of ours answers there.
    """
    url = url.rstrip("/").removesuffix("/v1")
    card = _card(url)
    tokenizer = _tokenizer(folder, config)
    words = Words(tokenizer, tokens_before_text(folder, tokenizer))
    try:
        own = card["early_exit"]
        return Served(url, str(card["id"]), words, tuple(own["exits"]), int(own["max_model_len"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FieldError("--server", f"{url} is no server of megatron_ee's") from error


def _card(url: str) -> Any:
    try:
        with urlopen(f"{url}/v1/models", timeout=_SECONDS) as answer:
            return json.load(answer)["data"][0]
    except (URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise FieldError("--server", f"{url} does not say which model it has ({error})") from error


def _tokenizer(folder: Path, config: Config) -> Tokenizer:
    if is_huggingface(folder):
        return open_tokenizer(str(folder) if has_tokenizer(folder) else config.data.tokenizer)
    from megatron_ee.inference.loading import open_checkpoint_tokenizer  # imports megatron-core, in its time

    return open_checkpoint_tokenizer(folder, read_description(folder))
