"""Turns what pydantic found into one line per wrong field, in the words of a config file.

Pydantic's locations name the branches of unions ("constrained-int", "literal['auto']") and its messages speak of
tuples and models. Walking the schema along a location tells the fields from the branches, and says what is allowed.
"""

from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_ee.config.checks import InvalidFieldsError
from megatron_ee.config.dialect import KeyPath, dotted, parse_path
from megatron_ee.config.errors import Place, Problem
from megatron_ee.config.fields import Section
from megatron_ee.config.schema import Config
from megatron_ee.errors import did_you_mean, nearest_name

TAG = "kind"
"""The field that tells sections apart where a field takes several."""


class Choice(NamedTuple):
    """One of the kinds of value that a field takes: a type and its limits (pydantic's metadata objects)."""

    type: Any
    limits: tuple[Any, ...] = ()


class Finding(NamedTuple):
    """What is wrong at a path.

    Attributes:
        of_union: the field takes several kinds of value.
        is_missing: nothing is written there.
        meant: where it was probably meant to be written.
    """

    path: KeyPath
    message: str
    of_union: bool = False
    is_missing: bool = False
    meant: KeyPath | None = None


def explain(error: ValidationError, places: dict[KeyPath, Place]) -> list[Problem]:
    """One line per wrong field of a Config: its place, its name, and what is allowed."""
    findings = [finding for details in error.errors(include_url=False) for finding in _findings(details)]
    mistyped = {finding.meant for finding in findings}
    problems = [
        Problem(nearest_place(finding.path, places), f"{dotted(finding.path)}: {finding.message}")
        for finding in findings
        # A list that is wrong inside is no 'auto' either, and what is mistyped is missing: one line for one mistake.
        if not (finding.of_union and any(_is_inside(other.path, finding.path) for other in findings))
        and not (finding.is_missing and finding.path in mistyped)
    ]
    return list(dict.fromkeys(problems))  # each branch of a union reported its own error


def nearest_place(path: KeyPath, places: dict[KeyPath, Place]) -> Place:
    """The place of the path, or of the innermost section around it that was written at all."""
    return next(places[path[:length]] for length in range(len(path), -1, -1) if path[:length] in places)


def is_field(path: KeyPath) -> bool:
    """Whether a config holds a value at the path: not a section, nor something else's name."""
    walked, choices = _walk(path)
    return walked == path and not all(_is_section(choice.type) for choice in choices)


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


def _findings(details: ErrorDetails) -> list[Finding]:
    kind, loc, value = details["type"], details["loc"], details["input"]
    path, choices = _walk(loc)
    match kind:
        case "default_factory_not_called":
            return []  # another field is wrong, and has its own line
        case "extra_forbidden" | "invalid_key":
            return [_unknown_key(loc)]
        case "missing" if isinstance(path[-1], str):
            return [Finding(path, "required, but missing", is_missing=True)]
        case "missing":  # the list is too short
            path, choices = _walk(path[:-1])
        case "value_error":
            return _between_fields(path, details["ctx"]["error"])
        case "union_tag_not_found":
            return [Finding((*path, TAG), "required, but missing", is_missing=True)]
        case "union_tag_invalid":
            tags = [tag for choice in choices for tag in _tags(choice.type)]
            tag = value[TAG]
            return [Finding((*path, TAG), f"{show(tag)} must be {_either(map(show, tags))}{_hint(tag, tags)}")]
        case "finite_number":
            return [Finding(path, f"{show(value)} is not a finite number")]
    subject = show(value)
    if loc[-1] == "[key]":
        subject = f"the key {subject}"
        (path, _), (_, choices) = _walk(loc[:-1]), _walk((*loc[:-2], "[key]"))
    if kind.endswith("_type") and len(choices) == 1:
        return [Finding(path, f"{subject} is not {_words(choices[0]._replace(limits=()))}")]
    names = [name for choice in choices if get_origin(choice.type) is Literal for name in get_args(choice.type)]
    allowed = dict.fromkeys(words for choice in choices for words in _each_in_words(choice))
    return [Finding(path, f"{subject} must be {_either(allowed)}{_hint(value, names)}", of_union=len(choices) > 1)]


def _hint(value: Any, names: list[str]) -> str:
    return did_you_mean(value, names) if isinstance(value, str) else ""


def _between_fields(section: KeyPath, error: ValueError) -> list[Finding]:
    if isinstance(error, InvalidFieldsError):
        return [Finding((*section, *parse_path(path)), message) for path, message in error.problems]
    return [Finding(section, str(error))]


def _unknown_key(loc: KeyPath) -> Finding:
    section, owners = _walk(loc[:-1])
    path = (*section, loc[-1])
    names = [name for owner in owners if _is_section(owner.type) for name in owner.type.model_fields]
    nearest = nearest_name(str(loc[-1]), names)
    if nearest is None:
        return Finding(path, "unknown key")
    return Finding(path, f"unknown key, did you mean {nearest!r}?", meant=(*section, nearest))


def _is_inside(path: KeyPath, other: KeyPath) -> bool:
    return len(path) > len(other) and path[: len(other)] == other


def _walk(loc: KeyPath) -> tuple[KeyPath, list[Choice]]:
    """The keys of a pydantic location, without the names of union branches, and the choices of the last one."""
    path: KeyPath = ()
    choices = [Choice(Config)]
    for key in loc:
        if inside := [choice for outer in choices for choice in _inside(outer.type, key)]:
            path, choices = (*path, key), inside
        else:
            choices = [choice for choice in choices if key in _tags(choice.type)] or choices
    return path, choices


def _tags(kind: Any) -> tuple[Any, ...]:
    """What says that a section is of this kind, where a field takes sections of several."""
    field = kind.model_fields.get(TAG) if _is_section(kind) else None
    return get_args(field.annotation) if field else ()


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _inside(kind: Any, key: str | int) -> list[Choice]:
    if _is_section(kind):
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


def _each_in_words(choice: Choice) -> list[str]:
    """What a choice allows, each name for itself."""
    names = get_origin(choice.type) is Literal
    return [show(name) for name in get_args(choice.type)] if names else [_words(choice)]


def _words(choice: Choice) -> str:
    """What a choice allows: "a positive integer", "'linear', 'cosine' or 'constant'", "a list of 3"."""
    limits = {
        name: limit
        for item in choice.limits
        for name in ("gt", "ge", "lt", "le", "pattern", "min_length")
        if (limit := getattr(item, name, None)) is not None
    }
    origin, arguments = get_origin(choice.type), get_args(choice.type)
    if origin is Literal:
        return _either(map(show, arguments))
    if origin is tuple:
        any_length = "a non-empty list" if limits else "a list"
        return any_length if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
    if choice.type in (int, float):
        return _number_words({int: "integer", float: "number"}[choice.type], limits)
    if choice.type is str and "min_length" in limits:
        return "a non-empty string"
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
