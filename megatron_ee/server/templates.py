"""How the conversations of clients are written for the model."""

from pathlib import Path

from megatron_ee.config import Config
from megatron_ee.errors import FieldError
from megatron_ee.tokenizer import Tokenizer
from megatron_ee.tokenizer.chat import CHAT_TEMPLATE_FILE, DEFAULT, ChatTemplate, open_chat_template

_FIELD = "serving.chat_template"


def open_serving_template(config: Config, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """As `serving.chat_template` says; or as the model learned it, which its folder keeps; or as its tokenizer says.
    None where nobody does.

    Raises:
        FieldError: the template is not there, or is none.
    """
    if config.serving.chat_template is not None:
        return open_chat_template(config.serving.chat_template, tokenizer, field=_FIELD)
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        return open_chat_template(str(folder / CHAT_TEMPLATE_FILE), tokenizer, field=_FIELD)
    if (learned := config.data.chat_template) != DEFAULT:  # of a checkpoint that is older than its keeping
        try:
            return open_chat_template(learned, tokenizer, field=_FIELD)
        except FieldError as error:
            raise FieldError(_FIELD, f"the model learned another than its tokenizer's: {error.message}") from error
    return None if tokenizer.chat_template is None else open_chat_template(DEFAULT, tokenizer, field=_FIELD)
