"""Strict YAML: text to plain values that know where they were written, and plain values back to text.

Stricter than YAML 1.1: only true and false are booleans, only decimal numbers are numbers (3e-4 included; dates and
1:30 are strings), and there are no tags, no merge keys and no duplicate keys.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from megatron_ee.config.errors import ConfigError, Place, Problem

KeyPath = tuple[str | int, ...]
PlaceOf = Callable[[int, int], Place]

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0|[1-9](?:_?[0-9]){0,19})\Z")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)\Z")


@dataclass(frozen=True)
class Tree:
    """Nested dicts, lists and scalars; where each key and list item was written; what was wrong with the writing."""

    values: Any
    places: dict[KeyPath, Place]
    problems: tuple[Problem, ...] = ()

    def merged_with(self, child: "Tree") -> "Tree":
        """Lay `child` over this tree: mappings merge, everything else is replaced."""
        values = _merge(self.values, child.values)
        kept = {path: place for path, place in self.places.items() if _leads_somewhere(values, path)}
        return Tree(values, {**kept, **child.places}, (*self.problems, *child.problems))

    def at(self, path: KeyPath) -> Any:
        """None where nothing is said."""
        values = self.values
        for key in path:
            values = values.get(key) if isinstance(values, dict) else None
        return values

    def without(self, key: str) -> "Tree":
        """This tree, but for one key of its outermost mapping."""
        return replace(self, values={name: value for name, value in self.values.items() if name != key})


def parse(text: str, place_of: PlaceOf, *, at: KeyPath = ()) -> Tree:
    """Read one YAML document, which stands at the key path `at`; empty text is null.

    `place_of` turns a line and a column, counted from 1, into the place that a problem there begins with.
    Raises ConfigError where the text is not YAML; problems that leave the rest readable are listed in the tree.
    """
    reader = _Reader(place_of)
    try:
        root = _compose(text, place_of)
        reader.places[at] = reader.place(root) if root else place_of(1, 1)
        values = reader.read(root, at) if root else None
    except RecursionError:
        raise ConfigError([Problem(place_of(1, 1), "nested too deeply")]) from None
    return Tree(values, reader.places, tuple(reader.problems))


def parse_path(text: str) -> KeyPath:
    """The keys of `exits.layers.0`, each as `parse` would read it: a whole number where it looks like one."""
    return tuple(int(key) if _INT.match(key) else key for key in text.split("."))


def to_text(values: Any) -> str:
    """YAML that `parse` reads back to equal values (tuples as lists); lists of scalars stay on one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _compose(text: str, place_of: PlaceOf) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = place_of(mark.line + 1, mark.column + 1) if mark else place_of(1, 1)
        reason = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = place_of(before.count("\n") + 1, len(before) - before.rfind("\n"))
        reason = f"the character {chr(error.character)!r} is not allowed"
    except (ValueError, OverflowError) as error:  # PyYAML lets them out for an escape such as "\UFFFFFFFF"
        place, reason = place_of(1, 1), str(error)
    raise ConfigError([Problem(place, " ".join(reason.split()))])


def _merge(parent: Any, child: Any) -> Any:
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return child
    return {**parent, **{key: _merge(parent.get(key), value) for key, value in child.items()}}


def _leads_somewhere(values: Any, path: KeyPath) -> bool:
    try:
        for key in path:
            values = values[key]
    except (LookupError, TypeError):
        return False
    return True


class _Reader:
    """Turns YAML nodes into values, noting the place of each and the problems on the way."""

    def __init__(self, place_of: PlaceOf) -> None:
        self._place_of = place_of
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []

    def place(self, node: yaml.Node) -> Place:
        return self._place_of(node.start_mark.line + 1, node.start_mark.column + 1)

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read_item(item, (*path, index)) for index, item in enumerate(node.value)]
        return _scalar(node)

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str | int, Any]:
        values: dict[str | int, Any] = {}
        for key_node, value_node in node.value:
            key, place = _scalar(key_node), self.place(key_node)
            if isinstance(key, bool) or not isinstance(key, str | int):
                self.problems.append(Problem(place, "a key must be a name or a whole number"))
            elif key in values:
                first = self.places[(*path, key)]
                self.problems.append(Problem(place, f"{dotted((*path, key))}: given twice, first at {first}"))
            else:
                self.places[(*path, key)] = place
                values[key] = self.read(value_node, (*path, key))
        return values

    def _read_item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = self.place(node)
        return self.read(node, path)


def dotted(path: KeyPath) -> str:
    """`path` as in model.num_layers; a key with unusual characters is quoted, so that a problem stays on one line."""
    return ".".join(str(key) if str(key).isidentifier() or isinstance(key, int) else repr(key) for key in path)


def _scalar(node: yaml.Node) -> Any:
    match node.tag.removeprefix(_TAG):
        case "bool":
            return node.value == "true"
        case "null":
            return None
        case "int":
            return int(node.value)
        case "float":
            return float(node.value)
    return node.value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with our scalars only and without tags."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag!r} is not allowed", event.start_mark)
        node = super().compose_node(parent, index)
        # A collection's end is noted when it has been read: an alias to one without an end stands inside it.
        if isinstance(node, yaml.CollectionNode) and node.end_mark is None:
            raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", event.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes whatever its own loader or ours would not read as a string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_scalar(self, tag: str, value: str, style: str | None = None) -> yaml.ScalarNode:
        # Escapes are the only spelling that survives for every line break and space that Unicode knows.
        return super().represent_scalar(tag, value, style if value.isprintable() else '"')

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        only_scalars = not any(isinstance(item, dict | list | tuple) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=only_scalars)


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("bool", re.compile(r"(?:true|false)\Z"), "tf"),
    ("null", re.compile(r"(?:null|~|)\Z"), ["n", "~", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    for _dialect in (_Loader, _Dumper):
        _dialect.add_implicit_resolver(_TAG + _kind, _pattern, list(_first))
