"""How a folder is decoded: by the config that lies in it, by one that is given, or, where neither is, by defaults.

Imports no torch: what is wrong is said before that takes its seconds.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.folders import is_huggingface
from megatron_ee.checkpoint.models import exits_in, has_tokenizer, read_model
from megatron_ee.config import Config, open_tree, read_tree, tree_of
from megatron_ee.config.dialect import Tree
from megatron_ee.errors import FieldError
from megatron_ee.inference.calibration.thresholds_file import with_thresholds

TOKENIZER, PLUGINS = "data.tokenizer", "plugins"


@contextmanager
def open_decoding_config(
    folder: Path, overrides: Sequence[str], *, config_file: Path | None = None
) -> Iterator[Config]:
    """The config to decode a step folder or a Hugging Face folder with; see `open_config`.

    Args:
        config_file: a config instead of the one that a step folder holds.

    Raises:
        ConfigError: see `load_config`.
        FieldError: plug-ins are named by the checkpoint alone; or there is no tokenizer; or see `with_thresholds`.
    """
    own, said = (own_tree(folder), Tree({}, {})) if config_file is None else (Tree({}, {}), read_tree(config_file))
    tree, thresholds = with_thresholds(folder, own, said, overrides)
    with open_tree(tree, config_file or folder, overrides, read_model=read_model) as config:
        if config_file is None:
            check_tokenizer(folder, is_named=_names(overrides, TOKENIZER))
            check_plugins(config, is_named=_names(overrides, PLUGINS))
        if thresholds is not None:
            thresholds.check(config)
        yield config


def own_tree(folder: Path) -> Tree:
    """What a step folder says of itself; of a Hugging Face folder, what a config has to say."""
    return tree_of(_defaults(folder), str(folder)) if is_huggingface(folder) else read_tree(folder / "config.yaml")


def check_tokenizer(folder: Path, *, is_named: bool) -> None:
    """
    Raises:
        FieldError: a Hugging Face folder has no tokenizer, and the user names none.
    """
    if is_huggingface(folder) and not has_tokenizer(folder) and not is_named:
        raise FieldError(TOKENIZER, f"{folder} has no tokenizer, so one has to be named")


def check_plugins(config: Config, *, is_named: bool) -> None:
    """
    Raises:
        FieldError: the checkpoint's config lists plug-ins. They are code, so the user has to name them.
    """
    if config.plugins and not is_named:
        names = ", ".join(config.plugins)
        raise FieldError(
            PLUGINS, f"the run used [{names}], which is code; say what may be run: plugins=[{names}] or []"
        )


def _names(overrides: Sequence[str], field: str) -> bool:
    return any(override.startswith(f"{field}=") for override in overrides)


def _defaults(folder: Path) -> dict[str, Any]:
    """What a config has to say, of a model that is not trained."""
    positions = read_model(folder).max_position_embeddings
    data: dict[str, Any] = {} if positions is None else {"sequence_length": min(positions, 1024)}
    if has_tokenizer(folder):
        data["tokenizer"] = str(folder)
    return {
        "name": "huggingface",
        "model": {"like": str(folder)},
        "exits": exits_in(folder).model_dump(),
        "data": data,
        "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
