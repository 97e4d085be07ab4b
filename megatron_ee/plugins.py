"""A user's own parts: Python files outside the package, listed in the YAML's `plugins` and chosen there by name.

A file defines any of these module-level dictionaries, from name to part:

  EXIT_MEASURES          confidence of an exit: logits_NV -> N in [0, 1]       inference.exit.measure
  PIPELINE_SCHEDULES     a stage's F and B actions: (Pipeline, stage) -> list  parallel.schedule
  OPTIMIZER_BACKENDS     (stage, config, mesh, gradients) -> OptimizerBackend    optimizer.backend
  LEARNING_RATE_DECAYS   (config, step, num_steps) -> share of the peak rate   optimizer.lr_decay

A measure is asked of N rows at once, with the exit's logits as they are, of V tokens. No row may depend on another's.

Files are code: they are run only where the user names them, never because a checkpoint's config does.
"""

import importlib.util
import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from megatron_ee.errors import FieldError, did_you_mean

Part = TypeVar("Part")

_KINDS = ("EXIT_MEASURES", "PIPELINE_SCHEDULES", "OPTIMIZER_BACKENDS", "LEARNING_RATE_DECAYS")


class PluginError(FieldError):
    """A plug-in cannot be used, or a name is neither built in nor a plug-in's."""


@dataclass(frozen=True, slots=True)
class Plugins:
    """What the files add; empty without files."""

    exit_measures: Mapping[str, Callable[..., Any]]
    pipeline_schedules: Mapping[str, Callable[..., Any]]
    optimizer_backends: Mapping[str, Callable[..., Any]]
    learning_rate_decays: Mapping[str, Callable[..., Any]]


def load_plugins(files: Sequence[str]) -> Plugins:
    """Run the files, in order.

    Raises:
        PluginError: a file is missing, fails, or defines nothing; or two define the same name.
    """
    modules = [_run(Path(file)) for file in files]
    return Plugins(*(_collect(modules, kind) for kind in _KINDS))


def choose(field: str, name: str, built_in: Mapping[str, Part], added: Mapping[str, Part]) -> Part:
    """The part that a config's field names.

    Raises:
        PluginError: neither has it, or a plug-in takes a built-in's name.
    """
    if clash := sorted(built_in.keys() & added.keys()):
        raise PluginError("plugins", f"{clash[0]!r} is built in ({field}); choose another name")
    parts = {**built_in, **added}
    if name not in parts:
        names = ", ".join(map(repr, parts))
        raise PluginError(field, f"{name!r} must be one of {names}{did_you_mean(name, parts)}")
    return parts[name]


def _run(file: Path) -> ModuleType:
    if not os.path.isfile(file):  # unlike pathlib's, false for what cannot be a path
        raise PluginError("plugins", f"{file} is not a file")
    spec = importlib.util.spec_from_file_location(f"megatron_ee_plugin_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise PluginError("plugins", f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        reason = " ".join(str(error).split())
        raise PluginError("plugins", f"{file} fails: {type(error).__name__}: {reason}") from error
    if not any(isinstance(getattr(module, kind, None), Mapping) for kind in _KINDS):
        raise PluginError("plugins", f"{file} defines none of {', '.join(_KINDS)}")
    return module


def _collect(modules: Sequence[ModuleType], kind: str) -> dict[str, Callable[..., Any]]:
    parts: dict[str, Callable[..., Any]] = {}
    for module in modules:
        for name, part in getattr(module, kind, {}).items():
            if name in parts:
                raise PluginError("plugins", f"{kind} {name!r} is defined twice, again in {module.__file__}")
            parts[name] = part
    return parts
