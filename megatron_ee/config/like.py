"""`model: {like: FOLDER}`: the architecture of a model that is there, in place of fields that would repeat it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ee.config.dialect import Tree
from megatron_ee.config.errors import Place, Problem
from megatron_ee.config.explain import show
from megatron_ee.config.model import ModelConfig
from megatron_ee.errors import UserError

ModelReader = Callable[[Path], ModelConfig]
"""What knows the formats of models: the architecture in a folder, its vocabulary as a number. Raises UserError."""

MAY_DIFFER = ("init_std", "max_position_embeddings")
"""What says nothing of a model's parameters."""

_LIKE = ("model", "like")


def resolve_like(tree: Tree, read_model: ModelReader | None) -> Tree:
    """A config's tree with the fields of the model that its `model.like` names, in place of it.

    A path is relative to the working directory, as a config's others. Fields that are given beside it are left where
    they agree; where they don't, it is a problem at the field, and the model's own value stands in for it. Where there
    is no model to read, the tree has no `model` (see `lacks_model`).
    """
    section = tree.values.get("model")
    if not isinstance(section, dict) or "like" not in section:
        return tree
    place, given = tree.places[_LIKE], {name: value for name, value in section.items() if name != "like"}
    try:
        model = _read(section["like"], read_model)
    except UserError as error:
        problem = Problem(place, f"model.like: {_in_a_line(str(error))}")
        return replace(tree.without("model"), problems=(*tree.problems, problem))
    problems, fields = _compare(model, given, tree.places, section["like"])
    places = {("model", name): place for name in fields} | tree.places
    return Tree({**tree.values, "model": fields}, places, (*tree.problems, *problems))


def lacks_model(tree: Tree) -> bool:
    """Whether `resolve_like` found no model to read: nothing can be said of the fields of `model`."""
    return "model" not in tree.values and _LIKE in tree.places


def _read(folder: Any, read_model: ModelReader | None) -> ModelConfig:
    if not isinstance(folder, str):
        raise UserError(f"{show(folder)} is not a string")
    if read_model is None:
        raise UserError("is not read here: give the fields of the model")
    try:
        return read_model(Path(folder))
    except UserError:
        raise
    except (ValueError, OSError) as error:  # a path that no system takes, or one that cannot be looked at
        raise UserError(f"{folder!r}: {error}") from None


def _compare(
    model: ModelConfig, given: Mapping[str, Any], places: Mapping[tuple[str | int, ...], Place], folder: str
) -> tuple[list[Problem], dict[str, Any]]:
    """What does not agree, and all fields. What is wrong by itself is left for the schema to say."""
    own = model.model_dump()
    fields, problems = {**own, **given}, []
    for name in [name for name in given if name in own and name not in MAY_DIFFER]:
        try:
            differs = getattr(ModelConfig.model_validate({**own, name: given[name]}), name) != getattr(model, name)
        except ValidationError as error:
            # what breaks a rule between fields, among those of a model that breaks none, is not the model's
            differs = all(details["type"] == "value_error" for details in error.errors())
        if differs:
            message = f"model.{name}: {show(given[name])} is not {show(own[name])}, which {folder} has (model.like)"
            problems.append(Problem(places[("model", name)], message))
            fields[name] = own[name]
    return problems, fields


def _in_a_line(text: str) -> str:
    """A path may have any character, and a problem is one line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
