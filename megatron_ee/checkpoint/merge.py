"""Makes one model of exits that were trained alone and the model that they were trained on."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ee.checkpoint.description import Description, Origin, Progress, is_beside_state, read_description
from megatron_ee.checkpoint.folders import CheckpointError, find_checkpoint, is_huggingface, written_aside
from megatron_ee.checkpoint.saver import Saver
from megatron_ee.checkpoint.sharded import differences, model_state, shape_of_trunk
from megatron_ee.checkpoint.sources import StepFolder, find_source, open_source
from megatron_ee.checkpoint.verify import verify
from megatron_ee.config import Config, ExitsConfig, ParallelConfig, load_config, to_yaml
from megatron_ee.device import Device
from megatron_ee.errors import UserError
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.model.trainable import EXITS
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.mesh import Mesh, open_mesh


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of it: the step folder, those that it was made of, and where its exits are from."""

    folder: Path
    initial: Path
    tuned: Path
    tuned_exits: tuple[int, ...]
    kept_exits: tuple[int, ...]


def merge_exits(tuned: Path, destination: Path, device: Device, *, initial: Path | None = None) -> Merged:
    """Write a run folder with one checkpoint: the model that exits were trained on, bit for bit, and these exits; those
    that the model had stay, unless they were trained further. It holds no optimizer state.

    The folder appears when it is complete. One process does it, in the memory that the whole model's parameters take.

    Args:
        tuned: a run or step folder of `training.trains: exits`.
        destination: of a name that a run may have, and not there yet.
        initial: the run, step folder or Hugging Face folder of the model, where it has moved.

    Raises:
        UserError: a checkpoint is not there, damaged, or not what the exits were trained on; the destination exists.
    """
    if destination.exists():
        raise UserError(f"{destination} exists; give a folder that does not")
    mesh = open_mesh(ParallelConfig(), device)
    tuned, exits = _open_tuned(tuned, mesh)
    assert exits.initial is not None, "a run that trains exits began with a model"
    initial = find_source(initial or Path(exits.initial.path), exits.initial)
    source = open_source(initial, mesh, reads_all=True, tokenizer=exits.tokenizer)
    model = source.description
    if different := differences(shape_of_trunk(exits), shape_of_trunk(model)):
        raise CheckpointError(f"{tuned} is of another model than {initial}: {different}")
    merged = merged_exits(model.exits, exits.exits)
    whole = tuned if is_huggingface(initial) else initial  # of the two, the one that lacks nothing beside the model
    config = _merged_config(whole, merged, destination)
    description = replace(
        model,
        exits=merged,
        progress=Progress(0, 0),
        has_optimizer=False,
        initial=Origin(str(initial), model.hash),
        files={},
    )
    stage = _build(description, mesh)
    state = model_state(stage, mesh)
    of_tuned = {name: entry for name, entry in state.items() if _belongs_to(entry.key, exits.exits.layers)}
    of_model = {name: entry for name, entry in state.items() if name not in of_tuned}
    for folder, part in ((source, of_model), (StepFolder(tuned, exits), of_tuned)):
        stage.load_sharded(folder.load(part), is_whole=False)
    files = {"config.yaml": to_yaml(config).encode()}
    files |= {name: (whole / name).read_bytes() for name in read_description(whole).files if is_beside_state(name)}
    step = _write(destination, stage, description, files, mesh)
    kept = tuple(layer for layer in merged.layers if layer not in exits.exits.layers)
    return Merged(step, initial, tuned, exits.exits.layers, kept)


def merged_exits(of_model: ExitsConfig, tuned: ExitsConfig) -> ExitsConfig:
    """The exits of both; what holds for all of them is the model's. An exit of both is the tuned one."""
    of = {layer: exits for exits in (of_model, tuned) for layer in exits.layers}
    layers = tuple(sorted(of))
    fields: dict[str, object] = {
        "layers": layers,
        "head": tuple(of[layer].head_of(layer) for layer in layers),
        "projection": tuple(of[layer].projection_of(layer) for layer in layers),
        "temperature": tuple(of[layer].temperature_of(layer) for layer in layers),
        "gate": tuple(of[layer].gate_of(layer) for layer in layers),
        "norm": (of_model if of_model.layers else tuned).norm,
    }
    if of_model.layerskip is None:
        fields["weights"] = tuple(of[layer].weights[of[layer].layers.index(layer)] for layer in layers)
        fields["weight_schedule"] = tuple(of[layer].weight_schedule_of(layer) for layer in layers)
    return ExitsConfig.model_validate(of_model.model_dump() | fields)


def _open_tuned(path: Path, mesh: Mesh) -> tuple[Path, Description]:
    folder = find_checkpoint(path)
    description = verify(folder, mesh, reads="all")
    if description.trains != "exits":
        raise CheckpointError(f"{folder} holds a whole model: it is not of a run with training.trains: exits")
    return folder, description


def _merged_config(whole: Path, exits: ExitsConfig, destination: Path) -> Config:
    """The model's, or of the run that tuned its exits, with the exits of both, under the destination's name."""
    config = load_config(whole / "config.yaml")
    fields = config.model_dump()
    fields |= {"name": destination.name, "runs": str(destination.parent), "exits": exits.model_dump()}
    fields["checkpoint"]["initial"] = None
    fields["training"]["trains"] = "all"
    fields["parallel"]["layout"] = "auto"  # a pinned one has no place for the new exits
    try:
        return Config.model_validate(fields)
    except ValueError as error:
        raise UserError(f"{destination} cannot be a run: {error}") from error


def _build(description: Description, mesh: Mesh) -> Stage:
    (chunks,) = place(description.model, description.exits, ParallelConfig())
    return Stage(
        description.model,
        description.exits,
        chunks,
        vocab_size=description.vocab_size,
        groups=mesh.groups,
        device=mesh.device,
        dtype=DTYPES[description.precision],
    )


def _belongs_to(name: str, layers: tuple[int, ...]) -> bool:
    return name.startswith(EXITS) and int(name.split(".")[1]) in layers


def _write(destination: Path, stage: Stage, description: Description, files: dict[str, bytes], mesh: Mesh) -> Path:
    with written_aside(destination) as aside:
        saver = Saver(aside, mesh, files)
        saver.start(lambda: {"model": model_state(stage, mesh)}, description, copies=False)
        step = saver.finish()
        assert step is not None, "the folder was empty"
        (aside / "config.yaml").write_bytes(files["config.yaml"])
    return destination / step.relative_to(aside)
