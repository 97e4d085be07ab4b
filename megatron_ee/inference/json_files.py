"""Files of figures and settings, as JSON. Imports no torch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ee.errors import UserError


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a file so that it is whole or as it was; its folder is made if there is none.

    Raises:
        UserError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
