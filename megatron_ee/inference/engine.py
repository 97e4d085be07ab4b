"""Continues one request's text, token by token."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ee.checkpoint.description import Description
from megatron_ee.checkpoint.folders import CheckpointError, is_huggingface
from megatron_ee.checkpoint.models import has_tokenizer
from megatron_ee.checkpoint.sharded import differences, model_state, shape_of_trunk
from megatron_ee.checkpoint.sources import open_source
from megatron_ee.config import Config, ParallelConfig
from megatron_ee.device import Device
from megatron_ee.inference.declared_exits import exits_to_decode
from megatron_ee.inference.decoder import Decoder
from megatron_ee.inference.policies import GATE, MEASURES, Measure, check_gates, thresholds_of
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.sampling import sample
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.plugins import choose, load_plugins
from megatron_ee.tokenizer import BYTES, Tokenizer, open_tokenizer


@dataclass(frozen=True, slots=True)
class Engine:
    """A model ready to decode, one request at a time."""

    stage: Stage
    tokenizer: Tokenizer
    exits: list[int]
    measures: Mapping[str, Measure | None]

    def generate(self, request: Request) -> Iterator[Emission]:
        """Tokens until the stop token or the request's limit.

        Raises:
            ValueError: the request names an exit that the model doesn't have, or asks a gate that it doesn't have.
        """
        thresholds = thresholds_of(request.exit, self.exits)
        measure = choose("inference.exit.measure", request.exit.measure, self.measures, {})
        if measure is GATE:
            check_gates(thresholds, self.gated)
        decoder = Decoder(
            self.stage,
            thresholds,
            measure,
            max_pending=request.exit.max_pending,
            capacity=len(request.prompt) + request.max_new_tokens,
        )
        generator = torch.Generator().manual_seed(request.seed)
        tokens = list(request.prompt)
        for _ in range(request.max_new_tokens):
            outcome = decoder.feed(tokens)
            logits_V = outcome.logits_V[: self.tokenizer.vocab_size]  # beyond it is padding
            token = sample(logits_V, temperature=request.temperature, top_k=request.top_k, generator=generator)
            if token == request.stop:
                return
            yield Emission(token, outcome.exit_layer, outcome.confidence)
            tokens = [token]

    @property
    def gated(self) -> list[int]:
        """The exits with a gate."""
        return [layer for layer in self.exits if self.stage.head(layer).gate is not None]

    @torch.no_grad()
    def full_depth_choices(self, tokens: list[int]) -> list[int]:
        """The token that the full model would choose after each of these, given all before it: the truth that an
        exit's choices are held against."""
        positions = torch.arange(len(tokens), device=next(self.stage.parameters()).device)
        x_SBH = self.stage.embed(positions.new_tensor([tokens]))
        num_layers = self.stage.model.num_layers
        y_SBH, _ = self.stage.run_layers(x_SBH, positions, 0, num_layers)
        logits_SBV = self.stage.exit_logits(y_SBH, num_layers, positions)[..., : self.tokenizer.vocab_size]
        return logits_SBV.argmax(-1).flatten().tolist()


def load_engine(folder: Path, config: Config, device: Device) -> Engine:
    """Open a step folder, whatever layout wrote it, or a Hugging Face folder, on this one process.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another format version.
        FieldError: see `exits_to_decode`.
    """
    mesh = open_mesh(ParallelConfig(), device)
    source = open_source(folder, mesh, reads_all=config.checkpoint.verify)
    description = source.description
    if description.trains == "exits":
        raise CheckpointError(f"checkpoint: {folder} holds exits alone; tools/merge_exits.py makes a model of it")
    if is_huggingface(folder):
        description = _described_by(config, folder, description)
        tokenizer = open_tokenizer(str(folder) if has_tokenizer(folder) else config.data.tokenizer)
    else:
        tokenizer = open_checkpoint_tokenizer(folder, description)
    (chunks,) = place(description.model, description.exits, ParallelConfig())
    stage = Stage(
        description.model,
        description.exits,
        chunks,
        vocab_size=description.vocab_size,
        groups=mesh.groups,
        device=device,
        dtype=DTYPES[description.precision],
    )
    stage.load_sharded(source.load(model_state(stage, mesh)))
    stage.eval().requires_grad_(False)
    measures = {**MEASURES, **load_plugins(config.plugins).exit_measures}
    return Engine(stage, tokenizer, list(description.exits.layers), measures)


def open_checkpoint_tokenizer(folder: Path, description: Description) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with, from the checkpoint's own files.

    Raises:
        UserError: the files are damaged or gone, or their library is not installed.
    """
    if description.tokenizer == BYTES:
        return open_tokenizer(BYTES)
    tokenizer = open_tokenizer(str(folder), field="checkpoint")
    if tokenizer.name != description.tokenizer:
        raise CheckpointError(f"checkpoint: {folder} holds tokenizer {tokenizer.name}, not {description.tokenizer}")
    return tokenizer


def _described_by(config: Config, folder: Path, found: Description) -> Description:
    """What a Hugging Face folder holds, with the config's exits where it has none of its own."""
    wanted = replace(found, model=config.model)
    if different := differences(shape_of_trunk(found), shape_of_trunk(wanted)):
        raise CheckpointError(f"checkpoint: {folder} is of another model than the config: {different}")
    return replace(found, exits=exits_to_decode(folder, found.exits, config.exits))
