"""What a server is started with: a serve file and overrides, which lie over the config of the checkpoint it serves.

Imports no torch: what is wrong is said before that takes its seconds.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from megatron_ee.checkpoint.folders import CheckpointError, find_model
from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import Config, ConfigError, DataConfig, laid_over, open_tree, parse_override, read_tree
from megatron_ee.config.dialect import KeyPath, Tree, dotted
from megatron_ee.config.errors import Place, Problem
from megatron_ee.config.explain import nearest_place
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.calibration.thresholds_file import with_thresholds
from megatron_ee.inference.opening import check_plugins, check_tokenizer, own_tree

SECTIONS = ("serving", "inference", "exits", "device", "seed", "plugins")
"""What a server decides itself, beside data.tokenizer; all else is as the model was trained."""

FLAG = "--model"
_MODEL = ("serving", "model")
_TOKENIZER = ("data", "tokenizer")
_SAYS = f"a server decides on {', '.join(SECTIONS)} and {dotted(_TOKENIZER)}"
_REQUIRED = ("name", "model", "training")
_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")
_WHICH = "which model? Give a run folder, a step folder or a Hugging Face folder, here or by --model"


@contextmanager
def open_serving_config(
    file: Path | None, overrides: Sequence[str], *, model: Path | None
) -> Iterator[tuple[Path, Config]]:
    """The folder to serve, a step folder or a Hugging Face folder, and the config to serve it with; see `open_config`.

    Args:
        file: a serve file, whose values hold where no override says otherwise.
        model: instead of `serving.model`.

    Raises:
        ConfigError: see `load_config`; also where a file or an override wants to change how the model was trained.
        FieldError: there is no model, or see `open_decoding_config`.
        UserError: a library that serves is not installed.
    """
    said = Tree({}, {}) if file is None else _only_served(read_tree(file))
    kept, refused = _split(overrides)
    said = replace(said, problems=(*said.problems, *refused))
    asked = laid_over(said, kept)
    by_flag, in_text = model is not None, asked.at(_MODEL)
    if model is None and isinstance(in_text, str):
        model = Path(in_text)
    if model is None:
        raise _missing(said, file, kept)
    folder = _find(model, asked, by_flag=by_flag)
    tree, thresholds = with_thresholds(folder, own_tree(folder), said, kept)
    with open_tree(tree, file or folder, kept, read_model=read_model) as config:
        check_tokenizer(folder, is_named=asked.at(_TOKENIZER) is not None)
        check_plugins(config, is_named=asked.at(("plugins",)) is not None)
        if thresholds is not None:
            thresholds.check(config)
        if thresholds is not None:
            thresholds.check(config)
        _check_libraries()
        serving = config.serving.model_copy(update={"model": str(model)})
        yield folder, config.model_copy(update={"serving": serving})


def _only_served(tree: Tree) -> Tree:
    """Without what is not for a server to decide, which becomes its problems. A name that no config has stays."""
    values = dict(tree.values)
    refused: list[tuple[KeyPath, str]] = []
    if "model" in values and "training" in values:
        refused.append((("model",), f"this is the config of a run. Name the run by --model; {_SAYS}"))
        values = {name: value for name, value in values.items() if name not in Config.model_fields}
    for name in [name for name in values if name in Config.model_fields and name not in (*SECTIONS, "data")]:
        refused.append(((name,), f"is the checkpoint's; {_SAYS}"))
        del values[name]
    if isinstance(of_data := values.get("data"), dict):
        for name in [name for name in of_data if name in DataConfig.model_fields and name != _TOKENIZER[1]]:
            instead = "is serving.chat_template here" if name == "chat_template" else f"is the checkpoint's; {_SAYS}"
            refused.append((("data", name), instead))
        values["data"] = {name: of for name, of in of_data.items() if ("data", name) not in dict(refused)}
    problems = [Problem(tree.places[path], f"{dotted(path)}: {message}") for path, message in refused]
    return Tree(values, tree.places, (*tree.problems, *problems))


def _split(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Those that a server may be given, or that are not read at all, and what is wrong with the others."""
    kept: list[str] = []
    problems: list[Problem] = []
    for override in overrides:
        try:
            refused = _only_served(parse_override(override, Tree({}, {}))).problems
        except ConfigError:
            refused = ()
        if refused:
            problems += refused
        else:
            kept.append(override)
    return kept, problems


def _missing(tree: Tree, file: Path | None, overrides: Sequence[str]) -> UserError:
    """That no model is named; or what else is wrong, as far as it can be told without one."""
    places = {(): Place(FLAG), **tree.places}
    try:
        with open_tree(replace(tree, places=places), file or Path(), overrides):
            raise AssertionError("a config without a model")
    except ConfigError as error:
        of_the_checkpoint = tuple(f": {name}: required, but missing" for name in _REQUIRED)
        if problems := [problem for problem in error.problems if not problem.endswith(of_the_checkpoint)]:
            return ConfigError(problems)
    return FieldError(FLAG, _WHICH) if file is None else _at(tree, _WHICH)


def _find(named: Path, asked: Tree, *, by_flag: bool) -> Path:
    try:
        return find_model(named)
    except (CheckpointError, OSError) as error:
        message = str(error).removeprefix("checkpoint: ")
        raise FieldError(FLAG, message) if by_flag else _at(asked, message) from error


def _check_libraries() -> None:
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise UserError(f"a server needs {' and '.join(missing)}: pip install 'megatron-ee[serve]'")


def _at(tree: Tree, message: str) -> ConfigError:
    return ConfigError([Problem(nearest_place(_MODEL, tree.places), f"{dotted(_MODEL)}: {message}")])
