"""A config.json, read field by field; what is not as it has to be is one message with the field's name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ee.errors import UserError

CONFIG_FILE = "config.json"


class Settings:
    """What a config.json, or an object in it, says. A field that is null has no default.

    Args:
        where: what a field's name follows in messages.
        defaults: of absent fields, where the class that reads the file in transformers has some.
    """

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self._values, self._where, self._defaults = values, where, defaults or {}

    def get(self, name: str) -> Any:
        """The field's value, or its default where it is absent; None without one."""
        return self._values[name] if name in self._values else self._defaults.get(name)

    def whole(self, name: str) -> int:
        """
        Raises:
            UserError: it is absent, or no positive whole number.
        """
        value = self._needed(name)
        if type(value) is not int or value <= 0:
            raise self.refusal(name, "not a positive whole number")
        return value

    def number(self, name: str) -> float:
        """
        Raises:
            UserError: it is absent, or no positive number.
        """
        value = self._needed(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refusal(name, "not a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """False where it is absent and has no default.

        Raises:
            UserError: it is neither true nor false.
        """
        value = self.get(name)
        if not (value is None or isinstance(value, bool)):
            raise self.refusal(name, "neither true nor false")
        return bool(value)

    def inner(self, name: str, defaults: Mapping[str, Any] | None = None) -> "Settings | None":
        """The object that a field is; None where it is absent or empty.

        Raises:
            UserError: it is something else.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refusal(name, "not an object")
        return Settings(value, f"{self._where}: {name}", defaults) if value else None

    def names(self) -> list[str]:
        """The fields that are there, and not null."""
        return [name for name, value in self._values.items() if value is not None]

    def refusal(self, name: str, reason: str) -> UserError:
        """What to raise about a field's value."""
        return UserError(f"{self._where}: {name} is {json.dumps(self.get(name))}: {reason}")

    def _needed(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise UserError(f"{self._where}: {name} is missing")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        UserError: it is not there, cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object in JSON")
    return content
