"""Turns what pydantic found into one line per wrong field, in the words of a config file.

Pydantic's locations name the branches of unions ("constrained-int", "literal['auto']") and its messages speak of
tuples and models. Walking the schema along a location tells the fields from the branches, and says what is allowed.
"""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_ee.config.checks import InvalidFieldsError
from megatron_ee.config.dialect import KeyPath, dotted
from megatron_ee.config.schema import Config, Section


class Choice(NamedTuple):
    """One of the kinds of value that a field takes: a type and its limits (pydantic's metadata objects)."""

    type: Any
    limits: tuple[Any, ...] = ()


class Problem(NamedTuple):
    """What is wrong at a path; `of_union` when the field takes several kinds of value."""

    path: KeyPath
    message: str
    of_union: bool = False


def explain(error: ValidationError, places: dict[KeyPath, str]) -> list[str]:
    """One line per wrong field of a Config: its place, its name, and what is allowed."""
    problems = [problem for details in error.errors(include_url=False) for problem in _problems(details)]
    lines = [
        f"{_nearest_place(problem.path, places)}: {dotted(problem.path)}: {problem.message}"
        for problem in problems
        # A list that is wrong inside is no 'auto' either; only the inside is worth a line.
        if not (problem.of_union and any(_is_inside(other.path, problem.path) for other in problems))
    ]
    return list(dict.fromkeys(lines))  # each branch of a union reported its own error


def show(value: Any) -> str:
    """`value` as in a config file, shortened."""
    match value:
        case bool() | None:
            text = {True: "true", False: "false", None: "null"}[value]
        case list() | tuple():
            text = f"[{', '.join(show(item) for item in value)}]"
        case dict():
            text = "a mapping"
        case _:
            text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _problems(details: ErrorDetails) -> list[Problem]:
    kind, loc, value = details["type"], details["loc"], details["input"]
    path, choices = _walk(loc)
    match kind:
        case "default_factory_not_called":
            return []  # another field is wrong, and has its own line
        case "extra_forbidden" | "invalid_key":
            section, owners = _walk(loc[:-1])
            return [Problem((*section, loc[-1]), f"unknown key{_nearest_name(loc[-1], owners)}")]
        case "missing" if isinstance(path[-1], str):
            return [Problem(path, "required, but missing")]
        case "missing":  # the list is too short
            path, choices = _walk(path[:-1])
        case "value_error":
            return _between_fields(path, details["ctx"]["error"])
        case "finite_number":
            return [Problem(path, f"{show(value)} is not a finite number")]
    subject = show(value)
    if loc[-1] == "[key]":
        subject = f"the key {subject}"
        (path, _), (_, choices) = _walk(loc[:-1]), _walk((*loc[:-2], "[key]"))
    if kind.endswith("_type") and len(choices) == 1:
        return [Problem(path, f"{subject} is not {_words(choices[0]._replace(limits=()))}")]
    return [Problem(path, f"{subject} must be {_either(map(_words, choices))}", of_union=len(choices) > 1)]


def _between_fields(section: KeyPath, error: ValueError) -> list[Problem]:
    if isinstance(error, InvalidFieldsError):
        return [Problem((*section, *path.split(".")), message) for path, message in error.problems]
    return [Problem(section, str(error))]


def _nearest_name(key: str | int, owners: list[Choice]) -> str:
    names = [name for owner in owners for name in owner.type.model_fields]
    nearest = get_close_matches(str(key), names, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def _nearest_place(path: KeyPath, places: dict[KeyPath, str]) -> str:
    """The place of the path, or of the innermost section around it that was written at all."""
    return next(places[path[:length]] for length in range(len(path), -1, -1) if path[:length] in places)


def _is_inside(path: KeyPath, other: KeyPath) -> bool:
    return len(path) > len(other) and path[: len(other)] == other


def _walk(loc: KeyPath) -> tuple[KeyPath, list[Choice]]:
    """The keys of a pydantic location, without the names of union branches, and the choices of the last one."""
    path: KeyPath = ()
    choices = [Choice(Config)]
    for key in loc:
        if inside := [choice for outer in choices for choice in _inside(outer.type, key)]:
            path, choices = (*path, key), inside
    return path, choices


def _inside(kind: Any, key: str | int) -> list[Choice]:
    if isinstance(kind, type) and issubclass(kind, Section):
        field = kind.model_fields.get(str(key))
        return list(_choices(field.annotation, *field.metadata)) if field else []
    if get_origin(kind) is dict:
        of_key, of_value = get_args(kind)
        return list(_choices(of_key if key == "[key]" else of_value))
    if get_origin(kind) is tuple and isinstance(key, int):
        return list(_choices(get_args(kind)[0]))
    return []


def _choices(annotation: Any, *limits: Any) -> Iterator[Choice]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [limit for item in arguments[1:] for limit in getattr(item, "metadata", [item])]
        yield from _choices(arguments[0], *limits, *inner)
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _choices(argument)
    else:
        yield Choice(annotation, limits)


def _words(choice: Choice) -> str:
    """What a choice allows: "a positive integer", "'linear', 'cosine' or 'constant'", "a list of 3"."""
    limits = {
        name: limit
        for item in choice.limits
        for name in ("gt", "ge", "lt", "le", "pattern")
        if (limit := getattr(item, name, None)) is not None
    }
    origin, arguments = get_origin(choice.type), get_args(choice.type)
    if origin is Literal:
        return _either(map(show, arguments))
    if origin is tuple:
        return "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
    if choice.type in (int, float):
        return _number_words({int: "integer", float: "number"}[choice.type], limits)
    plain = {str: "a string", bool: "true or false", NoneType: "null"}.get(choice.type, "a mapping")
    return f"{plain} that matches {limits['pattern']}" if "pattern" in limits else plain


def _number_words(noun: str, limits: dict[str, float]) -> str:
    if limits == {"gt": 0}:
        return f"a positive {noun}"
    if limits == {"ge": 0}:
        return f"a non-negative {noun}"
    names = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    bounds = " and ".join(f"{names[name]} {limit}" for name, limit in limits.items())
    return f"{'an' if noun == 'integer' else 'a'} {noun} {bounds}".rstrip()


def _either(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
