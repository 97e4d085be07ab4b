"""thresholds.json: exit settings that keep a promise, and for what: one checkpoint, and one way to draw tokens from it.

`inference.thresholds_file` names it. Its settings then are those of every request that says nothing else, and what
would void the promise is refused. Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.models import hash_of_model
from megatron_ee.config import Config, ExitParams, SamplingParams, laid_over, tree_of
from megatron_ee.config.dialect import KeyPath, Tree
from megatron_ee.config.explain import show
from megatron_ee.errors import FieldError
from megatron_ee.inference.json_files import write_json

VERSION = 1  # of the file
FIELD: KeyPath = ("inference", "thresholds_file")
_EXIT: KeyPath = ("inference", "exit")
_SETTINGS = ("mode", "threshold", "min_exit", "exits", "patience", "kv_policy")
EXIT_FIELDS = ("measure", "thresholds", *_SETTINGS)
"""What decides at which exit a token leaves, and from which keys and values."""
SAMPLING_FIELDS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias"),
)
"""What decides which token an exit's logits become."""


@dataclass(frozen=True, slots=True)
class ThresholdsFile:
    """
    Attributes:
        checkpoint_hash: see `hash_of_model`.
        exit: the values of EXIT_FIELDS, as a config has them.
        sampling: the values of SAMPLING_FIELDS.
    """

    path: Path
    checkpoint_hash: str
    exit: Mapping[str, Any]
    sampling: Mapping[str, Any]

    def put_into(self, own: Tree) -> Tree:
        """What a checkpoint's config says, with these exit settings in the place of its own."""
        inference = own.at(("inference",))
        if isinstance(inference, dict):
            kept = {name: value for name, value in inference.items() if name != "exit"}
            places = {path: place for path, place in own.places.items() if path[:2] != _EXIT}
            own = Tree({**own.values, "inference": kept}, places, own.problems)
        return own.merged_with(tree_of({"inference": {"exit": dict(self.exit)}}, str(self.path)))

    def check(self, config: Config) -> None:
        """That nobody has said otherwise.

        Raises:
            FieldError: a file or an override did, of something that the promise depends on.
        """
        inference = config.inference
        _check_same(self.path, "exit", inference.exit, ExitParams.model_validate(self.exit), EXIT_FIELDS)
        sampling = SamplingParams.model_validate(self.sampling)
        _check_same(self.path, "sampling", inference.sampling, sampling, SAMPLING_FIELDS)


def with_thresholds(
    folder: Path, own: Tree, said: Tree, overrides: Sequence[str]
) -> tuple[Tree, ThresholdsFile | None]:
    """The tree to decode a folder with, and the file of thresholds that it names, whose settings are in it already.

    Args:
        own: what the folder says of itself, over which the thresholds lie.
        said: what a user's file says, over both.

    Raises:
        FieldError: the file cannot be read, or was made for another checkpoint.
    """
    tree = own.merged_with(said)
    named = laid_over(tree, overrides).at(FIELD)
    if not isinstance(named, str) or not named:
        return tree, None
    thresholds = read_thresholds(Path(named))
    found = hash_of_model(folder)
    if found != thresholds.checkpoint_hash:
        raise _wrong(
            f"{named} was made for another checkpoint, {thresholds.checkpoint_hash[:12]}..., and {folder} is "
            f"{found[:12]}...; tools/calibrate_thresholds.py makes one for it"
        )
    return thresholds.put_into(own).merged_with(said), thresholds


def read_thresholds(path: Path) -> ThresholdsFile:
    """
    Raises:
        FieldError: there is no such file, or it is damaged; the message names the file and its field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(f"{path} cannot be read as JSON ({error})") from error
    fields = content if isinstance(content, dict) else {}
    if (version := fields.get("version")) != VERSION or isinstance(version, bool):
        raise _wrong(f"{path}: version: {version!r}, not {VERSION}")
    settings = _mapping(path, fields, "settings")
    exit = {"measure": fields.get("measure"), "thresholds": _by_layer(_mapping(path, fields, "thresholds"))}
    exit |= _exactly(path, settings, "exit", _SETTINGS)
    sampling = _exactly(path, settings, "sampling", SAMPLING_FIELDS)
    sampling["logit_bias"] = _by_layer(sampling["logit_bias"])
    checkpoint_hash = fields.get("checkpoint_hash")
    if not isinstance(checkpoint_hash, str):
        raise _wrong(f"{path}: checkpoint_hash: {checkpoint_hash!r} is none")
    for name, kind, values in (("exit", ExitParams, exit), ("sampling", SamplingParams, sampling)):
        try:
            kind.model_validate(values)
        except ValueError as error:
            raise _wrong(f"{path}: {name} is damaged: {' '.join(str(error).split())}") from error
    return ThresholdsFile(path, checkpoint_hash, exit, sampling)


def write_thresholds(
    path: Path, checkpoint_hash: str, exit: ExitParams, sampling: SamplingParams, promise: Mapping[str, Any]
) -> None:
    """Write the file so that it is whole or as it was.

    Args:
        promise: what is promised and how it was found, for people and reports.

    Raises:
        UserError: it cannot be written.
    """
    said = exit.model_dump(mode="json")
    content = {
        "version": VERSION,
        "checkpoint_hash": checkpoint_hash,
        "measure": exit.measure,
        "thresholds": said["thresholds"],
        "settings": {
            "exit": {name: said[name] for name in _SETTINGS},
            "sampling": sampling.model_dump(mode="json", include=set(SAMPLING_FIELDS)),
        },
        "promise": dict(promise),
    }
    write_json(path, content)


def _check_same(path: Path, section: str, found: Any, promised: Any, names: Sequence[str]) -> None:
    for name in names:
        value, of_file = getattr(found, name), getattr(promised, name)
        if value != of_file:
            said, of_file = (of if isinstance(of, dict) else show(of) for of in (value, of_file))
            message = f"{said}, but {path} holds for {of_file} alone; leave out one of them"
            raise FieldError(f"inference.{section}.{name}", message)


def _mapping(path: Path, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise _wrong(f"{path}: {name}: {value!r} is no mapping")
    return value


def _exactly(path: Path, settings: Mapping[str, Any], name: str, wanted: Sequence[str]) -> dict[str, Any]:
    """So that nothing is left to a default, which another release may have otherwise."""
    values = _mapping(path, settings, name)
    if different := set(values) ^ set(wanted):
        raise _wrong(f"{path}: settings.{name}: {sorted(different)[0]} is missing, or too much")
    return dict(values)


def _by_layer(values: Any) -> Any:
    """JSON has no numbers for keys."""
    if not isinstance(values, dict):
        return values
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in values.items()}


def _wrong(message: str) -> FieldError:
    return FieldError(".".join(map(str, FIELD)), message)
