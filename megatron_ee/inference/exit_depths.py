"""The file that says how deep tokens went: how many left after which layer. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.json_files import write_json

VERSION = 1  # of the file


def write_depths(path: Path, tokens: Mapping[int, int], *, num_layers: int, exit: ExitParams) -> None:
    """Write what was counted, so that the file is whole or as it was.

    Args:
        tokens: number of layers run -> tokens that came out there.
        exit: the settings that it was counted with, for people who read the file.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "version": VERSION,
        "num_layers": num_layers,
        "tokens": {str(layer): count for layer, count in sorted(tokens.items())},
        "exit": exit.model_dump(mode="json"),
    }
    write_json(path, content)


def read_depths(path: Path, exits: Sequence[int], num_layers: int) -> dict[int, int]:
    """What `write_depths` wrote: number of layers run -> tokens that came out there, ascending.

    Args:
        exits: the layers after which the model has early exits.

    Raises:
        FieldError: there is no such file, it is damaged, or it was counted with another model; the message names the
            file and its field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _wrong(f"{path} does not exist; python -m megatron_ee.inference --depths writes such files") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(f"{path} cannot be read as JSON ({error})") from error
    fields = content if isinstance(content, dict) else {}
    _check_number(path, fields, "version", VERSION)
    _check_number(path, fields, "num_layers", num_layers)
    tokens = fields.get("tokens")
    if not isinstance(tokens, dict):
        raise _wrong(f"{path}: tokens: {tokens!r}, not a mapping from layers to numbers of tokens")
    ends = {str(layer): layer for layer in (*exits, num_layers)}
    for layer, count in tokens.items():
        if layer not in ends:
            raise _wrong(f"{path}: tokens.{layer}: the model has no exit there, only after layers {[*ends.values()]}")
        if not _is_whole(count) or count < 0:
            raise _wrong(f"{path}: tokens.{layer}: {count!r} is no number of tokens")
    if not any(tokens.values()):
        raise _wrong(f"{path}: tokens: there is none")
    return dict(sorted((ends[layer], count) for layer, count in tokens.items()))


def _check_number(path: Path, fields: Mapping[str, Any], name: str, wanted: int) -> None:
    found = fields.get(name)
    if not _is_whole(found) or found != wanted:
        raise _wrong(f"{path}: {name}: {found!r}, not {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(message: str) -> FieldError:
    return FieldError("inference.parallel.depths", message)
