"""Reads a run's YAML: one file, at most one base file under it, and `key.path=value` overrides on top."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ee.config.dialect import KeyPath, Tree, dotted, parse, parse_path, to_text
from megatron_ee.config.errors import ConfigError, Place, Problem
from megatron_ee.config.explain import explain, is_field, nearest_place, show
from megatron_ee.config.like import ModelReader, lacks_model, resolve_like
from megatron_ee.config.schema import Config
from megatron_ee.errors import FieldError


def load_config(path: str | Path, overrides: Sequence[str] = (), *, read_model: ModelReader | None = None) -> Config:
    """Read, merge and validate a config file.

    `base: other.yaml` in the file names a parent, relative to it, whose values hold where the file says nothing.
    Each override `key.path=value` is YAML on its right side and is laid over the file like a child over its base.
    `model: {like: FOLDER}` is what `read_model` finds there; None: it is an error.
    Raises ConfigError with every problem, one line each: the file's in its order, its base's, the overrides'.
    """
    return _resolve(read_tree(Path(path)), Path(path), overrides, read_model)[0]


@contextmanager
def open_config(
    path: str | Path, overrides: Sequence[str] = (), *, read_model: ModelReader | None = None
) -> Iterator[Config]:
    """`load_config`, for entry points: what a config does not fit is found out only where it is used.

    A FieldError out of the `with` block becomes a ConfigError with the place of that field, like any other.
    """
    with open_tree(read_tree(Path(path)), Path(path), overrides, read_model=read_model) as config:
        yield config


@contextmanager
def open_tree(
    tree: Tree, path: Path, overrides: Sequence[str] = (), *, read_model: ModelReader | None = None
) -> Iterator[Config]:
    """`open_config`, of a tree that was put together elsewhere.

    Args:
        path: whose problems come first.
    """
    config, places = _resolve(tree, path, overrides, read_model)
    with _placing(places):
        yield config


def tree_of(values: Mapping[str, Any], source: str) -> Tree:
    """Values that no file holds.

    Args:
        source: what messages about them begin with.
    """
    return Tree(dict(values), _places(values, Place(source)))


def read_tree(path: Path) -> Tree:
    """What a file says, and its base where it says nothing; not checked yet.

    Raises:
        ConfigError: one of them cannot be read as YAML.
    """
    child = _read(path)
    if "base" not in child.values:
        return child
    base, place = child.values["base"], f"{child.places[('base',)]}: base"
    if not isinstance(base, str):
        raise ConfigError([f"{place}: {show(base)} is not a string"])
    parent_path = path.parent / base
    parent = _read(parent_path, named_by=f"{place}: ")
    if "base" in parent.values:
        raise ConfigError([f"{place}: {parent_path} has a base of its own, but only one parent is allowed"])
    return parent.merged_with(child.without("base"))


def parse_override(override: str, tree: Tree) -> Tree:
    """The override as a tree of its own, to lay over `tree`.

    Raises:
        ConfigError: it is none, or goes into what is no mapping there.
    """
    place = Place(f"override {override!r}")
    name, equals, text = override.partition("=")
    path = parse_path(name)
    if not equals or "" in path:
        raise ConfigError([f"{place}: must look like key.path=value"])
    section = tree.values
    for depth, key in enumerate(path):
        if not isinstance(section, dict):
            raise ConfigError([f"{place}: {dotted(path[:depth])} is {show(section)}, not a mapping"])
        section = section.get(key, {})
    value = parse(text, lambda _line, _column: place, at=path)
    values = value.values
    for key in reversed(path):
        values = {key: values}
    new_sections = {path[:depth]: place for depth in range(len(path)) if path[:depth] not in tree.places}
    return Tree(values, {**new_sections, **value.places}, value.problems)


def laid_over(tree: Tree, overrides: Sequence[str]) -> Tree:
    """The tree with overrides, as far as they can be read: what is wrong with others is said where it is opened."""
    for override in overrides:
        try:
            tree = tree.merged_with(parse_override(override, tree))
        except ConfigError:
            continue
    return tree


def to_yaml(config: Config) -> str:
    """The resolved tree in the schema's order; `load_config` reads it back to an equal Config."""
    return to_text(config.model_dump())


@contextmanager
def _placing(places: dict[KeyPath, Place]) -> Iterator[None]:
    try:
        yield
    except FieldError as error:
        field = parse_path(error.field)
        if not is_field(field):
            raise
        raise ConfigError([Problem(nearest_place(field, places), str(error))]) from error


def _places(values: Mapping[str, Any], place: Place) -> dict[KeyPath, Place]:
    """The same place for each section and its fields."""
    sections: dict[KeyPath, Place] = {(name,): place for name in values}
    fields = [(name, field) for name, section in values.items() if isinstance(section, Mapping) for field in section]
    return {(): place, **sections, **dict.fromkeys(fields, place)}


def _resolve(
    tree: Tree, path: Path, overrides: Sequence[str], read_model: ModelReader | None
) -> tuple[Config, dict[KeyPath, Place]]:
    not_read = []
    for override in overrides:
        try:
            tree = tree.merged_with(parse_override(override, tree))
        except ConfigError as error:
            not_read += error.problems
    tree = resolve_like(tree, read_model)
    problems = list(tree.problems)
    config = None
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        found = explain(error, tree.places)
        problems += [problem for problem in found if not (lacks_model(tree) and problem.message.startswith("model:"))]
    if config is None or problems or not_read:
        raise ConfigError([*sorted(problems, key=lambda problem: _order(problem.place, path)), *not_read])
    return config, tree.places


def _order(place: Place, path: Path) -> tuple[bool, bool, int, int]:
    """Sorts places: the file at `path` from its beginning, then its base, then overrides."""
    return not place.line, place.source != str(path), place.line, place.column


def _read(path: Path, *, named_by: str = "") -> Tree:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{named_by}{path}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{named_by}{path}: not UTF-8 at byte {error.start}"]) from None
    except ValueError as error:  # a path that no system takes
        raise ConfigError([f"{named_by}{str(path)!r}: {error}"]) from None
    tree = parse(text, lambda line, column: Place(str(path), line, column))
    if tree.values is None:
        raise ConfigError([f"{named_by}{path}: empty, but a config is a mapping"])
    if not isinstance(tree.values, dict):
        raise ConfigError([f"{tree.places[()]}: {show(tree.values)} is not a mapping, but a config is"])
    return tree
