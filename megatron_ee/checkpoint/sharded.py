"""Sharded checkpoints through megatron-core: whatever layout wrote them, any layout reads them."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ee.checkpoint.description import Description, read_description
from megatron_ee.checkpoint.folders import CheckpointError
from megatron_ee.checkpoint.in_place import InPlaceStrategy, keep_wholes
from megatron_ee.checkpoint.unpickling import check_pickles
from megatron_ee.checkpoint.verify import verify_shards
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh


def model_state(stage: Stage, mesh: Mesh) -> ShardedStateDict:
    """The stage's parameters as shards of the whole model's."""
    # only some layers have exits: megatron-core must not stack the layers' parameters into one tensor
    return stage.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp, "non_homogeneous_layers": True})


def trained_state(stage: Stage, mesh: Mesh) -> ShardedStateDict:
    """Of those, the parameters that are trained: what a run saves and goes on from."""
    frozen = {name for name, parameter in stage.named_parameters() if not parameter.requires_grad}
    return {name: entry for name, entry in model_state(stage, mesh).items() if name not in frozen}


class ReadError(CheckpointError):
    """Shards could not be read. All ranks raise it together."""


def load_checkpoint(
    folder: Path,
    state: ShardedStateDict,
    *,
    asks_for_all: bool = True,
    checksums: dict[str, str] | None = None,
) -> dict:
    """Read what `state` asks for, into its own tensors; every rank calls it.

    Args:
        asks_for_all: whether the ranks' states together are whole tensors, with a main copy each, which is checked.
        checksums: gets the checksum of each file of shards that this rank has read whole; None: nobody asks.

    Raises:
        CheckpointError: the checkpoint holds another model, or pickles that could run any code.
        ReadError: it is damaged.
    """
    check_pickles(folder)
    keep_wholes(state)
    try:
        return dist_checkpointing.load(
            state, str(folder), InPlaceStrategy(checksums), validate_access_integrity=asks_for_all
        )
    except dist_checkpointing.core.CheckpointingException as error:
        raise CheckpointError(f"{folder} doesn't fit this model: {error}") from error
    except CheckpointException as error:
        cause = next((str(cause) for cause, _ in error.failures.values()), str(error))
        raise ReadError(f"{folder} cannot be loaded: {cause}") from error
    except (OSError, EOFError, UnpicklingError, RuntimeError) as error:
        # of files that are not what they were, which are found before where checkpoint.verify is on
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error


def load_verified(folder: Path, state: ShardedStateDict, mesh: Mesh) -> dict:
    """`load_checkpoint`, which also compares the shards with what was saved, while they are read. The other files have
    been verified before.

    Raises:
        DamagedError: a shard is missing, incomplete or changed; the state's tensors are of no use then.
    """
    checksums: dict[str, str] = {}
    try:
        loaded = load_checkpoint(folder, state, checksums=checksums)
    except ReadError:
        verify_shards(folder, mesh)  # it knows the file
        raise
    verify_shards(folder, mesh, known=checksums)
    return loaded


def names_in(folder: Path) -> frozenset[str]:
    """The tensors in a checkpoint, by the names of the whole model's parameters; among others, the optimizer's.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    check_pickles(folder)
    return frozenset(dist_checkpointing.load_tensors_metadata(str(folder)))


def check_same_model(folder: Path, description: Description) -> Description:
    """The checkpoint's own description, when it is of the model that `description` asks for.

    Raises:
        CheckpointError: names the fields that differ.
    """
    saved = read_description(folder)
    wanted, found = _shape(description), _shape(saved)
    if different := differences(found, wanted):
        raise CheckpointError(f"{folder} is of another model: {different}")
    if not saved.has_optimizer:
        raise CheckpointError(
            f"{folder} holds parameters alone, which no run goes on from: begin another run, with checkpoint.initial"
        )
    return saved


def differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """What is not as it has to be, by name; "" where all is."""
    return "; ".join(
        f"{name} is {found.get(name)}, not {wanted[name]}" for name in wanted if wanted[name] != found.get(name)
    )


def shape_of_trunk(description: Description) -> dict[str, object]:
    """What decides the names and shapes of all parameters but the early exits', and how the layers compute."""
    aside = ("init_std", "max_position_embeddings", "vocab_size")
    model = {f"model.{name}": value for name, value in description.model if name not in aside}
    return {**model, "tokenizer": description.tokenizer, "vocab_size": description.vocab_size}


def _shape(description: Description) -> dict[str, object]:
    layers = description.exits.layers
    return {
        **shape_of_trunk(description),
        "exits.layers": layers,
        "exits.head": _in_short(tuple(map(description.exits.head_of, layers))),
        "exits.projection": _in_short(tuple(map(description.exits.projection_of, layers))),
        "exits.temperature": _in_short(tuple(map(description.exits.temperature_of, layers))),
        "exits.gate": _in_short(tuple(map(description.exits.gate_of, layers))),
        "exits.norm": description.exits.norm,
        "training.precision": description.precision,
        "training.trains": description.trains,
    }


def _in_short(of_exits: tuple[str, ...] | tuple[float, ...]) -> str | float | tuple[str, ...] | tuple[float, ...]:
    return of_exits[0] if len(set(of_exits)) == 1 else of_exits
