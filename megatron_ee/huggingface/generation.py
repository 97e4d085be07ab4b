"""What Hugging Face's folders say of generation: which tokens end a text."""

from pathlib import Path

from megatron_ee.huggingface.settings import CONFIG_FILE, Settings, read_json

GENERATION_FILE = "generation_config.json"
_FIELD = "eos_token_id"


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Token ids: of generation_config.json, or where it is not there or names none, of config.json; maybe none at all.

    A chat model has several: what ends its turn, and what ends a document.

    Raises:
        UserError: a file is damaged, or the field is neither a token id nor a list of them.
    """
    for name in (GENERATION_FILE, CONFIG_FILE):
        path = folder / name
        if (name == CONFIG_FILE or path.exists()) and (tokens := _read(Settings(read_json(path), str(path)))):
            return tokens
    return ()


def _read(settings: Settings) -> tuple[int, ...]:
    value = settings.get(_FIELD)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise settings.refusal(_FIELD, "neither a token id nor a list of them")
    return tuple(tokens)
