"""The parameters that a run begins with: another run's, in whatever layout, or those of a Hugging Face folder, with
exits that it may lack.

An exit that the checkpoint has, after the same layer and of the same make, keeps its parameters. One that it lacks
begins as a copy of what does the same for the model (EE-Tuning, Pan et al., arXiv 2402.00518, section 3.1), or random.
"""

import logging
from pathlib import Path

from megatron_ee.checkpoint.description import Description, Origin
from megatron_ee.checkpoint.folders import CheckpointError, is_huggingface
from megatron_ee.checkpoint.sharded import differences, model_state, shape_of_trunk
from megatron_ee.checkpoint.sources import ModelSource, find_source, open_source
from megatron_ee.config import Config, ExitsConfig, ModelConfig
from megatron_ee.errors import FieldError, UserError
from megatron_ee.model.stage import Stage
from megatron_ee.model.trainable import EXITS
from megatron_ee.parallel.mesh import Mesh

FIELD = "checkpoint.initial"


def open_initial(config: Config, wanted: Description, mesh: Mesh, *, resumed: Description | None) -> ModelSource | None:
    """What `checkpoint.initial` names, or None where the run has no use for it. Collective.

    A run that is resumed has its own parameters; but where only exits are trained it saves no others, and takes the
    rest of the model from the very checkpoint that it began with.

    Args:
        wanted: the model that is to be trained.
        resumed: what the run goes on from; None at its beginning.

    Raises:
        FieldError: there is no such folder, it is damaged, of another model, or not what the run began with.
    """
    if config.checkpoint.initial is None or (resumed is not None and resumed.trains == "all"):
        return None
    path, began_with = Path(config.checkpoint.initial), resumed.initial if resumed else None
    try:
        folder = mesh.from_main(lambda: find_source(path, began_with))
        source = open_source(folder, mesh, reads_all=config.checkpoint.verify, tokenizer=wanted.tokenizer)
    except CheckpointError as error:
        raise FieldError(FIELD, str(error).removeprefix("checkpoint: ")) from error
    _check_fits(folder, source.description, wanted)
    if mesh.is_main and resumed is None:
        _announce(folder, source.description, wanted)
    return source


def origin_of(source: ModelSource | None) -> Origin | None:
    """What a run's record says of the folder that it began with."""
    return Origin(str(source.path), source.description.hash) if source is not None else None


def load_initial(initial: ModelSource, stage: Stage, mesh: Mesh, exits: ExitsConfig) -> None:
    """Fill a stage's parameters. Collective. What the folder lacks, and nothing is a copy for, stays as it is.

    Raises:
        FieldError: its files are damaged.
    """
    names, kept = initial.names(), kept_exits(initial.description.exits, exits)
    parts: dict[int, dict] = {layer: {} for layer in (0, *exits.layers)}  # in each, a name on disk occurs once
    for name, entry in model_state(stage, mesh).items():
        layer = _exit_of(entry.key)
        if layer == 0 or (layer in kept and entry.key in names):
            parts[0][name] = entry
        elif exits.initialize == "copy" and (source := copied_from(entry.key, stage.model)) is not None:
            entry.key = source
            parts[layer][name] = entry
    for part in parts.values():
        try:
            loaded = initial.load(part, asks_for_all=False)
        except UserError as error:
            raise FieldError(FIELD, str(error)) from error
        stage.load_sharded(loaded, is_whole=False)


def kept_exits(saved: ExitsConfig, wanted: ExitsConfig) -> list[int]:
    """Layers of the exits that both have, made alike; a gate may be new."""
    return [
        layer
        for layer in wanted.layers
        if layer in saved.layers
        and _make_of(saved, layer) == _make_of(wanted, layer)
        and saved.gate_of(layer) in ("none", wanted.gate_of(layer))
    ]


def copied_from(name: str, model: ModelConfig) -> str | None:
    """The parameter of the model that a new exit's begins as; None: it has no counterpart.

    Args:
        name: exits.<layer>.<part>.*
    """
    _, layer, part = name.split(".", 2)
    match part.split(".")[0]:
        case "norm":
            return part
        case "output":
            return "embedding.weight" if model.tie_embeddings else part
        case "pre_mlp_layernorm" | "mlp":
            return f"layers.{layer}.{part}"
        case "block":
            return f"layers.{model.num_layers}.{part.removeprefix('block.')}"
    return None


def _make_of(exits: ExitsConfig, layer: int) -> str:
    return f"{exits.head_of(layer)} head, {exits.norm} norm, {exits.projection_of(layer)} projection"


def _exit_of(name: str) -> int:
    """The layer of the early exit that a parameter belongs to; 0: to none."""
    return int(name.split(".")[1]) if name.startswith(EXITS) else 0


def _check_fits(folder: Path, saved: Description, wanted: Description) -> None:
    if saved.trains == "exits":
        raise FieldError(FIELD, f"{folder} holds exits alone; tools/merge_exits.py makes a model of it")
    if is_huggingface(folder) and saved.tokenizer != wanted.tokenizer:
        own, other = saved.tokenizer, wanted.tokenizer
        raise FieldError(FIELD, f"{folder} has tokenizer {own}, and data.tokenizer is {other}; name the folder there")
    found, needed = shape_of_trunk(saved), shape_of_trunk(wanted)
    if wanted.trains == "exits":  # what is not trained keeps its precision
        found["training.precision"], needed["training.precision"] = saved.precision, wanted.precision
    if different := differences(found, needed):
        raise FieldError(FIELD, f"{folder} is of another model: {different}")
    if wanted.trains == "exits":
        _check_replaces_none(folder, saved.exits, wanted.exits)


def _check_replaces_none(folder: Path, saved: ExitsConfig, wanted: ExitsConfig) -> None:
    """Exits that are trained further stay what they are, and others beside them do."""
    if saved.layers and saved.norm != wanted.norm:
        raise FieldError(FIELD, f"{folder} has exits with exits.norm: {saved.norm}, not {wanted.norm}")
    others = set(saved.layers) & set(wanted.layers) - set(kept_exits(saved, wanted))
    if others:
        layer = min(others)
        found, other = (f"{_make_of(exits, layer)}, gate: {exits.gate_of(layer)}" for exits in (saved, wanted))
        raise FieldError(FIELD, f"{folder} has an exit {layer} ({found}), and another ({other}) would replace it")


def _announce(folder: Path, saved: Description, wanted: Description) -> None:
    log = logging.getLogger("megatron_ee")
    kept = kept_exits(saved.exits, wanted.exits)
    new = [layer for layer in wanted.exits.layers if layer not in kept]
    how = {"copy": "copies of the model's own parts", "random": "random"}[wanted.exits.initialize]
    parts = [f"{_name(layers)} {state}" for layers, state in ((kept, "as trained"), (new, f"as {how}")) if layers]
    if saved.precision != wanted.precision:
        parts.insert(0, f"its {saved.precision} parameters as {wanted.precision}")
    log.info("begins with %s%s", folder, "".join(f", {part}" for part in parts))
    rest = [layer for layer in saved.exits.layers if layer not in kept]
    if rest and wanted.trains == "all":
        log.warning(
            "%s of %s: not among exits.layers as they were made, so this run leaves them out", _name(rest), folder
        )


def _name(layers: list[int]) -> str:
    return f"exit{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
