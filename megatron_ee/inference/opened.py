"""A model that is open for decoding, with what belongs to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_ee.inference.facts import ModelFacts, facts_of
from megatron_ee.inference.measures import Measure
from megatron_ee.inference.ring import Pipeline, Ring
from megatron_ee.inference.runner import Runner
from megatron_ee.inference.scheduling.costs import ROW_SHARES, SegmentCosts, estimated_costs
from megatron_ee.inference.speculation.costs import CALLS, draft_costs
from megatron_ee.inference.speculation.law import DraftCosts
from megatron_ee.inference.stages import Stages, depths_of
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.plugins import choose
from megatron_ee.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """
    Attributes:
        stage: all layers and exits, or those of this process.
        exits: the layers after which the model has early exits.
        measures: by the names that `inference.exit.measure` may have.
        stop_token_ids: what ends a text unless a request says otherwise.
        begin: tokens that come before a prompt that is given as a text.
        max_positions: longest sequence that the model was made for; None: it doesn't say.
        packs_weights: see `Product`.
        mesh: of the processes that hold the model together; None: there is only this one.
        pipeline: of which the stage is a part; None: it is the whole model.
    """

    stage: Stage
    tokenizer: Tokenizer
    exits: tuple[int, ...]
    measures: Mapping[str, Measure]
    stop_token_ids: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    max_positions: int | None = None
    packs_weights: bool = True
    mesh: Mesh | None = None
    pipeline: Pipeline | None = None

    @cached_property
    def runner(self) -> Runner:
        attending = self.facts.attending
        return Runner(self.stage, self.tokenizer.vocab_size, packs=self.packs_weights, attending=attending)

    @cached_property
    def facts(self) -> ModelFacts:
        """Of the whole model."""
        return facts_of(self.stage) if self.pipeline is None else self.pipeline.facts

    @cached_property
    def stages(self) -> Stages:
        return Stages((self.stage.model.num_layers,)) if self.pipeline is None else self.pipeline.stages

    @property
    def ring(self) -> Ring | None:
        """The other stages, where there are any in other processes."""
        return None if self.pipeline is None else self.pipeline.ring

    @cached_property
    def draft_costs(self) -> Mapping[int, DraftCosts]:
        """Of drafting at each exit."""
        return draft_costs(self.facts, self.exits, self._device)

    @cached_property
    def launch_costs(self) -> SegmentCosts:
        """Estimated by what launches read, in bytes."""
        weights, borders = self.facts.weights, self.depths[1:-1]
        heads = {layer: size + weights.projections[layer] for layer, size in weights.features.items()}
        device = self._device
        return estimated_costs(weights.layers, borders, ROW_SHARES[device], calls=CALLS[device], heads=heads)

    @property
    def depths(self) -> tuple[int, ...]:
        """Where rows may wait or end, in layers run."""
        return depths_of(self.exits, self.stages)

    @property
    def gated(self) -> frozenset[int]:
        """The exits with a gate."""
        return self.facts.gated

    @property
    def _device(self) -> str:
        return next(self.stage.parameters()).device.type

    def measure_named(self, name: str) -> Measure:
        """
        Raises:
            PluginError: there is none.
        """
        return choose("inference.exit.measure", name, self.measures, {})

    @torch.no_grad()
    def full_depth_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[S, V] of the model's dtype, as `AskedExit.logits`: what the full model says after each of S tokens, given
        all before it."""
        positions = torch.arange(len(tokens), device=next(self.stage.parameters()).device)
        x_SBH = self.stage.embed(positions.new_tensor([list(tokens)]))
        num_layers = self.stage.model.num_layers
        y_SBH, _ = self.stage.run_layers(x_SBH, positions, 0, num_layers)
        features_SBH = self.stage.exit_features(y_SBH, num_layers, positions)
        return self.runner.project(features_SBH[:, 0], num_layers)

    def full_depth_choices(self, tokens: Sequence[int]) -> list[int]:
        """The token that the full model would choose after each of these, given all before it: the truth that an
        exit's choices are held against."""
        return self.full_depth_logits(tokens).argmax(-1).tolist()
