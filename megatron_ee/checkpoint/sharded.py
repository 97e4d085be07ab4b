"""Sharded checkpoints through megatron-core: any layout writes them, any layout reads them."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_ee.checkpoint.description import Description, read_description, write_description
from megatron_ee.checkpoint.folders import CheckpointError, is_whole, link_latest, step_folder
from megatron_ee.checkpoint.prune import prune
from megatron_ee.config import Config, to_yaml
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh


def model_state(stage: Stage, mesh: Mesh) -> ShardedStateDict:
    """The stage's parameters as shards of the whole model's."""
    # only some layers have exits: megatron-core must not stack the layers' parameters into one tensor
    return stage.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp, "non_homogeneous_layers": True})


def save_checkpoint(
    run: Path,
    state: ShardedStateDict,
    description: Description,
    *,
    config: Config,
    mesh: Mesh,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a step folder, unless this step is saved already; every rank calls it. Until its last moment the folder is
    no checkpoint.

    Args:
        state: shards (see `model_state`), and plain values that all ranks agree on.
        files: name -> content of what else the folder needs to stand alone: the tokenizer's.
    """
    folder = step_folder(run, description.progress.iteration)
    if is_whole(folder):
        return folder
    mesh.barrier()  # no rank may look after another has begun to write
    if mesh.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed save left
        folder.mkdir(parents=True)
    mesh.barrier()
    dist_checkpointing.save(state, str(folder))
    if mesh.is_main:
        (folder / "config.yaml").write_text(to_yaml(config))
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
    digests = _digests_of_all_ranks(folder, mesh)
    if mesh.is_main:
        write_description(folder, replace(description, files=digests))
        link_latest(folder)
        prune(run, config.checkpoint)
    mesh.barrier()
    return folder


def load_checkpoint(folder: Path, state: ShardedStateDict) -> dict:
    """Read what `state` asks for; every rank calls it.

    Raises:
        CheckpointError: the checkpoint holds another model.
    """
    try:
        return dist_checkpointing.load(state, str(folder))
    except dist_checkpointing.core.CheckpointingException as error:
        raise CheckpointError(f"{folder} doesn't fit this model: {error}") from error


def load_stage(folder: Path, stage: Stage, mesh: Mesh) -> None:
    """Fill a stage's parameters from a checkpoint of any layout."""
    stage.load_sharded(load_checkpoint(folder, {"model": model_state(stage, mesh)})["model"])


def check_same_model(folder: Path, description: Description) -> Description:
    """The checkpoint's own description, when it is of the model that `description` asks for.

    Raises:
        CheckpointError: names the fields that differ.
    """
    saved = read_description(folder)
    wanted, found = _shape(description), _shape(saved)
    different = [f"{name} is {found[name]}, not {wanted[name]}" for name in wanted if wanted[name] != found.get(name)]
    if different:
        raise CheckpointError(f"{folder} is of another model: {'; '.join(different)}")
    return saved


def _shape(description: Description) -> dict[str, object]:
    """What decides the parameters' names and shapes, and how the layers compute."""
    model = {f"model.{name}": value for name, value in description.model if name not in ("init_std", "vocab_size")}
    layers = description.exits.layers
    exits = {
        "exits.layers": layers,
        "exits.head": _in_short(tuple(map(description.exits.head_of, layers))),
        "exits.projection": _in_short(tuple(map(description.exits.projection_of, layers))),
    }
    model["training.precision"] = description.precision
    return {**model, **exits, "tokenizer": description.tokenizer, "vocab_size": description.vocab_size}


def _in_short(of_exits: tuple[str, ...]) -> str | tuple[str, ...]:
    return of_exits[0] if len(set(of_exits)) == 1 else of_exits


def _digests_of_all_ranks(folder: Path, mesh: Mesh) -> dict[str, str]:
    """Each rank reads back what it wrote; the main rank also the small files."""
    mesh.barrier()
    own = [path for path in folder.iterdir() if path.name.startswith(f"__{mesh.rank}_")]
    if mesh.is_main:
        own += [path for path in folder.iterdir() if not path.name.startswith("__")]
    gathered: list[dict[str, str]] = [{}] * mesh.world_size
    dist.all_gather_object(gathered, {path.name: _sha256(path) for path in own})
    return {name: digest for digests in gathered for name, digest in digests.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
