"""API keys: a YAML list of clients, each with the SHA-256 of its key, so that the file itself opens nothing.

    - name: alice
      sha256: 9f2b...          # or a list of two, while a key is being changed
      layer_tokens: 2000000    # may be left out, as all that follows
      window: 60.0
      weight: 2.0
      max_running: 4

python -m megatron_ee.server.guard.keys NAME prints a new entry, and its key beside it, once.
"""

import argparse
import hashlib
import logging
import math
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Any

from megatron_ee.config.dialect import KeyPath, Tree, parse, to_text
from megatron_ee.config.errors import ConfigError, Place, Problem
from megatron_ee.config.explain import show
from megatron_ee.errors import nearest_name

PREFIX = "ee-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_RESERVED = ("anybody", "shadow")
_FIELDS = ("name", "sha256", "layer_tokens", "window", "weight", "max_running")


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks.

    Attributes:
        layer_tokens: its budget, for each `window` seconds; None: no limit.
        weight: of its share where several clients wait.
        max_running: of its requests at a time; None: no limit.
    """

    name: str
    layer_tokens: float | None = None
    window: float = 60.0
    weight: float = 1.0
    max_running: int | None = None


ANYBODY = Client("anybody")
"""Whoever connects, where no keys are used."""


class KeyRing:
    """
    Args:
        clients: by the SHA-256 of their keys, in hexadecimal.
    """

    def __init__(self, clients: Mapping[str, Client]) -> None:
        self._clients = tuple((digest.encode(), client) for digest, client in clients.items())

    @classmethod
    def read(cls, path: str | Path) -> "KeyRing":
        """
        Raises:
            ConfigError: with every problem, one line each, and its place in the file.
        """
        tree = _read(Path(path))
        entries = _Entries(tree)
        clients = entries.clients()
        problems = sorted([*tree.problems, *entries.problems], key=lambda problem: problem.place[1:])
        if problems:
            raise ConfigError(problems)
        return cls(clients)

    @property
    def clients(self) -> tuple[Client, ...]:
        """Each once, in the file's order."""
        return tuple(dict.fromkeys(client for _, client in self._clients))

    def client_of(self, key: str | None) -> Client | None:
        """Whose key it is. Every entry is compared, so that the time taken tells nothing of which one fits."""
        if key is None:
            return None
        digest, found = digest_of(key).encode(), None
        for own, client in self._clients:
            if compare_digest(own, digest):
                found = client
        return found


def digest_of(key: str) -> str:
    """What the file holds of a key. A plain hash is enough for keys of 256 random bits, which nobody guesses."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> str:
    """A random key."""
    return PREFIX + secrets.token_urlsafe(32)


def _read(path: Path) -> Tree:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from None
    if mode & 0o077:
        logging.getLogger("megatron_ee").warning("%s: others may read or change it; chmod 600 keeps them out", path)
    return parse(text, lambda line, column: Place(str(path), line, column))


class _Entries:
    """Reads the clients of a file, noting what is wrong with each."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.problems: list[Problem] = []

    def clients(self) -> dict[str, Client]:
        """By the hashes of their keys; not all of them, where there are problems."""
        values = self._tree.values
        if not isinstance(values, list) or not values:
            self._note((), "needs a list of clients, one at least")
            return {}
        clients: dict[str, Client] = {}
        names: dict[str, KeyPath] = {}
        hashes: dict[str, KeyPath] = {}
        for number, entry in enumerate(values):
            if not isinstance(entry, dict):
                self._note((number,), f"{show(entry)} is not a mapping, but a client is")
                continue
            found = len(self.problems)
            fields = self._fields(number, entry)
            if name := fields.get("name"):
                self._once((number, "name"), name, name, names)
            for path, digest in fields["sha256"]:
                self._once(path, digest, f"the hash {digest[:8]}...", hashes)
            if len(self.problems) == found:
                client = Client(**{field: value for field, value in fields.items() if field != "sha256"})
                clients.update({digest: client for _, digest in fields["sha256"]})
        return clients

    def _fields(self, number: int, entry: dict[str | int, Any]) -> dict[str, Any]:
        """The right ones, of which `sha256` is a list of paths and hashes."""
        for key in entry:
            if key not in _FIELDS:
                nearest = nearest_name(str(key), _FIELDS)
                self._note((number, key), "unknown key" + (f", did you mean {nearest!r}?" if nearest else ""))
        for required in ("name", "sha256"):
            if required not in entry:
                self._note((number,), f"{required} is required, but missing")
        if "window" in entry and entry.get("layer_tokens") is None:
            self._note((number, "window"), "is of a budget, but layer_tokens is missing")
        fields: dict[str, Any] = {"sha256": list(self._hashes(number, entry["sha256"])) if "sha256" in entry else []}
        if "name" in entry and self._is_name((number, "name"), entry["name"]):
            fields["name"] = entry["name"]
        for field in ("layer_tokens", "window", "weight"):
            if field in entry and self._is_number((number, field), entry[field]):
                fields[field] = float(entry[field])
        if "max_running" in entry and self._is_count((number, "max_running"), entry["max_running"]):
            fields["max_running"] = entry["max_running"]
        return fields

    def _hashes(self, number: int, value: Any) -> Iterator[tuple[KeyPath, str]]:
        path: KeyPath = (number, "sha256")
        if isinstance(value, list) and not value:
            self._note(path, "needs one hash at least")
        items = [((*path, index), item) for index, item in enumerate(value)] if isinstance(value, list) else None
        for where, digest in items if items is not None else [(path, value)]:
            if isinstance(digest, str) and _SHA256.match(digest):
                yield where, digest
            else:  # which may be the key itself, so that it is not shown
                self._note(where, "must be a key's SHA-256 in 64 small hexadecimal digits")

    def _is_name(self, path: KeyPath, value: Any) -> bool:
        if not isinstance(value, str) or not _NAME.match(value):
            return self._note(path, f"{show(value)} must be letters, digits, '.', '_' or '-', 64 at most")
        return self._note(path, f"{value} is taken by the server itself") if value in _RESERVED else True

    def _is_number(self, path: KeyPath, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            return self._note(path, f"{show(value)} must be a positive number")
        return True

    def _is_count(self, path: KeyPath, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return self._note(path, f"{show(value)} must be a positive integer")
        return True

    def _once(self, path: KeyPath, value: str, words: str, seen: dict[str, KeyPath]) -> None:
        if value in seen:
            self._note(path, f"{words} is given twice, first at {self._tree.places[seen[value]]}")
        seen.setdefault(value, path)

    def _note(self, path: KeyPath, message: str) -> bool:
        """False, so that a check can end with it."""
        self.problems.append(Problem(self._tree.places[path], f"{self._words(path)}: {message}"))
        return False

    def _words(self, path: KeyPath) -> str:
        """The entry, by its name where it has one, and the field."""
        if not path:
            return "keys"
        number, *field = path
        entry = self._tree.values[number]
        name = entry.get("name") if isinstance(entry, dict) else None
        named = f" ({name})" if isinstance(name, str) and _NAME.match(name) else ""
        inside = "".join(f".{key if isinstance(key, int) or str(key).isidentifier() else repr(key)}" for key in field)
        return f"client {int(number) + 1}{named}{inside}"


def main() -> int:
    """The entry on stdout, to be added to the file; the key on stderr. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ee.server.guard.keys",
        description="A new key: its entry for the file goes to stdout, the key itself to stderr.",
    )
    parser.add_argument("name", help="of the client")
    parser.add_argument("--layer-tokens", type=float, metavar="N", help="its budget: layers run, times tokens")
    parser.add_argument("--window", type=float, metavar="S", help="the seconds in which the budget grows anew")
    parser.add_argument("--weight", type=float, metavar="W", help="of its share where several clients wait")
    parser.add_argument("--max-running", type=int, metavar="N", help="of its requests at a time")
    arguments = parser.parse_args()
    key = new_key()
    entry = {"name": arguments.name, "sha256": digest_of(key), **vars(arguments)}
    text = to_text([{field: value for field, value in entry.items() if value is not None}])
    entries = _Entries(parse(text, lambda _line, _column: Place("a new key")))
    entries.clients()
    if entries.problems:
        print("\n".join(map(str, entries.problems)), file=sys.stderr)
        return 2
    print(f"The key of {arguments.name}, which nothing keeps: {key}", file=sys.stderr)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
