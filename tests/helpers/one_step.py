"""One training step on real ranks, and the same by one autograd over the plain model of `reference.py`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from helpers import reference
from helpers.shards import pieces_of, whole
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, RandomSamples
from megatron_ee.config import Config
from megatron_ee.data.loader import BatchLoader, SampleSource
from megatron_ee.device import choose_device
from megatron_ee.model.layer_drop import KeptRows
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.chunks import Layout
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.plan import Fill
from megatron_ee.training.assemble import build_layer_dropout, build_runtime, build_stage, gradients_vary
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.loss_weights import weights_at
from megatron_ee.training.losses import count_tokens
from megatron_ee.training.observation.metrics import ExitMeter
from megatron_ee.training.optimizers.megatron import MegatronAdamW
from megatron_ee.training.planning import plan_step
from megatron_ee.training.stage_step import StageStep

Arrays = dict[str, np.ndarray]
BATCH_SIZE = 8


def one_step(
    config: Config,
    fills: Sequence[Fill] | None = None,
    repeats: int = 1,
    frozen_stage: int | None = None,
    source: SampleSource | None = None,
    iteration: int = 0,
    change: Callable[[Stage], None] = lambda stage: None,
) -> dict[str, Any]:
    """On each rank: a step on the first global batch, then the optimizer's.

    Args:
        fills: of schedule filled-1f1b; None: those that the planner chooses.
        repeats: how often the gradients are computed; overlapped sums begin in the second time.
        source: of the samples; None: `RandomSamples`.
        iteration: whose weights and probabilities of layer dropout hold, in the last of them.
        change: of the initial parameters.
    """
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    layout = layout_of(config, VOCAB_SIZE)
    stage = build_stage(config, layout, VOCAB_SIZE, mesh)
    if mesh.pipeline_rank == frozen_stage:
        stage.requires_grad_(False)
    change(stage)
    parameters = pieces_of(stage, lambda parameter: parameter)
    buffers = StageGradients(stage, mesh, config.parallel, varies=gradients_vary(config))
    size = config.training.micro_batch_size
    num_microbatches = BATCH_SIZE // (mesh.data_size * size)
    plan = plan_step(config, layout, VOCAB_SIZE, num_microbatches, fills=fills)
    loader = BatchLoader(
        source or RandomSamples(), mesh, global_batch_size=BATCH_SIZE, micro_batch_size=size, num_fills=len(plan.fills)
    )
    batch = loader.batch(0)
    tokens = count_tokens(batch, plan, mesh)
    positions = SEQUENCE_LENGTH // (config.parallel.tensor if config.parallel.sequence else 1)
    message = MessageSpec((positions, size, config.model.hidden_size), torch.float32, mesh.device.torch)
    runtime = build_runtime(config, mesh, message, stage, buffers)
    syncs = _count_syncs(buffers)
    for number in range(iteration - repeats + 1, iteration + 1):
        weights = weights_at(config, max(0, number))
        step = StageStep(
            stage,
            batch,
            plan,
            tokens,
            weights,
            exits=config.exits,
            no_sync=buffers.no_sync,
            kept=_kept(config, loader.sample_numbers(0), max(0, number), [int(layer) for layer in stage.layers]),
            settle=buffers.settle,
        )
        buffers.zero()
        syncs.clear()
        runtime.run(plan, step)
        issued_while_running = len(syncs)
        buffers.reduce(tokens.gradient_factor)
    if config.parallel.distributed_optimizer:
        _gather_shards(buffers, mesh)
    gradients = pieces_of(stage, lambda parameter: parameter.main_grad if parameter.requires_grad else None)
    meter = ExitMeter(list(config.trained_exits), mesh, gated=config.exits.gated)
    meter.add(step.losses, tokens.regular, weights)
    figures = meter.read("train", weights)
    own_norm = None if config.parallel.distributed_optimizer else buffers.norm()
    gradient_norm = MegatronAdamW(stage, config.optimizer, mesh, buffers).step(config.optimizer.lr)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "figures": figures,
        "own_norm": own_norm,
        "gradient_norm": gradient_norm,
        "stepped": pieces_of(stage, lambda parameter: parameter),
        "issued_while_running": issued_while_running,
        "num_buckets": len(buffers.ddp.bucket_groups),
        "fills": plan.fills,
        "layout": layout,
    }


def _kept(config: Config, samples_MB: Sequence[Sequence[int]], iteration: int, layers: Sequence[int]) -> list[KeptRows]:
    dropout = build_layer_dropout(config)
    return dropout.kept(samples_MB, iteration, layers, torch.device("cpu")) if dropout is not None else []


def skipped_layers(config: Config, sample: int, iteration: int) -> list[int]:
    """What a sample skips, asked for it alone."""
    return [int(layer) for kept in _kept(config, [[sample]], iteration, range(1, 9)) for layer in kept]


def assert_equals_reference(config: Config, results: Sequence[dict[str, Any]], iteration: int = 0) -> None:
    """Losses, every gradient, the norm and the updated parameters are those of one process, in fp32."""
    parameters = whole(result["parameters"] for result in results)
    losses, gradients = reference_step(config, parameters, results[0]["layout"], results[0]["fills"], iteration)
    for result in results:
        for layer, loss in losses.items():
            np.testing.assert_allclose(result["figures"][f"train/exit_{layer}/loss"], loss, atol=1e-5, err_msg=layer)
    measured = whole(result["gradients"] for result in results)
    assert measured.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(measured[name], gradient, atol=1e-5 * scale, rtol=0, err_msg=name)
    of_model = [gradient for name, gradient in gradients.items() if ".gate." not in name]  # gates slow nothing down
    norm = float(np.sqrt(sum(np.square(gradient).sum() for gradient in of_model)))
    for result in results:
        np.testing.assert_allclose(result["gradient_norm"], norm, rtol=1e-5, err_msg="a copy counts once")
        if result["own_norm"] is not None:
            np.testing.assert_allclose(result["own_norm"], norm, rtol=1e-5, err_msg="a copy counts once")
    stepped = whole(result["stepped"] for result in results)
    for name, value in _adamw(config, parameters, gradients, norm).items():
        np.testing.assert_allclose(stepped[name], value, atol=1e-5, rtol=0, err_msg=name)


def reference_step(
    config: Config, parameters: Arrays, layout: Layout, fills: Sequence[Fill], iteration: int = 0
) -> tuple[dict[int, float], Arrays]:
    """Each exit's loss over the regular batch, and every gradient, fills weighted as training/losses.py says."""
    weights = weights_at(config, iteration)
    batch = samples_of(config, 0, BATCH_SIZE, iteration)
    with torch.no_grad():
        logits = reference.exit_logits(
            _leaves(parameters), config.model, config.exits, batch.tokens_BS, skipped=batch.skipped
        )
        losses = {
            layer: reference.weighted_loss(logits, batch.labels_BS, batch.mask_BS, {layer: 1.0}).item()
            for layer in weights
        }
    gradients = {name: np.zeros_like(value) for name, value in parameters.items()}
    for stage in range(len(layout)):
        reference_stage = _ReferenceStage(config, parameters, layout, stage, iteration)
        for name, gradient in reference_stage.gradients(batch, fills, weights).items():
            gradients[name] += gradient
    return losses, gradients


class Samples(NamedTuple):
    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    mask_BS: torch.Tensor
    skipped: list[list[int]] | None  # layers, of each sample


class _ReferenceStage:
    """What one stage adds to the gradients: those of its own parameters, and of the shared weight by its own exits."""

    def __init__(self, config: Config, parameters: Arrays, layout: Layout, stage: int, iteration: int) -> None:
        self.config, self.stage, self.iteration = config, stage, iteration
        self.leaves = _leaves(parameters)
        self.stage_of = {layer: number for number, chunks in enumerate(layout) for c in chunks for layer in c.exits}
        self.own_layers = {layer for c in layout[stage] for layer in range(c.start + 1, c.stop + 1)}
        self.shared = "embedding.weight" if config.model.tie_embeddings else "output.weight"

    def gradients(self, batch: Samples, fills: Sequence[Fill], weights: Mapping[int, float]) -> Arrays:
        data_size = BATCH_SIZE // _num_microbatches(self.config)
        firsts = range(BATCH_SIZE, BATCH_SIZE + len(fills) * data_size, data_size)
        parts = [samples_of(self.config, first, data_size, self.iteration) for first in firsts]
        counts = [float(part.mask_BS.sum()) for part in parts]
        regular = float(batch.mask_BS.sum())
        divisors = dict.fromkeys(weights, regular)
        for fill, count in zip(fills, counts, strict=True):
            for layer in self._reached(fill, weights):
                divisors[layer] += count
        total, cooldown = self._loss(batch, weights, divisors), 0.0
        for fill, part, count in zip(fills, parts, counts, strict=True):
            if fill.kind == "warmup":
                reached = {layer: weights[layer] for layer in self._reached(fill, weights)}
                total = total + self._loss(part, reached, divisors)
            elif fill.stage <= self.stage:
                total = total + self._loss(part, weights, dict.fromkeys(weights, regular))
                cooldown += count
        total.backward()
        factor = regular / (regular + cooldown)
        return {
            name: factor * leaf.grad.numpy()
            for name, leaf in self.leaves.items()
            if leaf.grad is not None and self._is_own(name)
        }

    def _reached(self, fill: Fill, weights: Mapping[int, float]) -> list[int]:
        return [layer for layer in weights if fill.kind == "warmup" and self.stage_of[layer] <= fill.stage]

    def _loss(self, part: Samples, weights: Mapping[int, float], divisors: Mapping[int, float]) -> torch.Tensor:
        shared = self.leaves[self.shared]
        projections = {
            layer: shared if stage == self.stage else shared.detach() for layer, stage in self.stage_of.items()
        }
        leaves = dict(self.leaves)
        if self.stage > 0:
            leaves["embedding.weight"] = leaves["embedding.weight"].detach()
        model, exits = self.config.model, self.config.exits
        norms = None
        if exits.norm == "shared":
            norm = self.leaves["norm.weight"]
            norms = {layer: norm if stage == self.stage else norm.detach() for layer, stage in self.stage_of.items()}
        outputs = reference.exit_outputs(
            leaves, model, exits, part.tokens_BS, shared=projections, norms=norms, skipped=part.skipped
        )
        total = torch.zeros((), requires_grad=True)
        for layer, weight in weights.items():
            losses_BS = weight * reference.token_losses(outputs.logits, layer, exits, part.labels_BS)
            if layer in exits.gated:
                of_gate_BS = reference.gate_losses(outputs, layer, exits, part.labels_BS)
                losses_BS = losses_BS + exits.gate_loss.weight * of_gate_BS
            total = total + (losses_BS * part.mask_BS).sum() / divisors[layer]
        return total

    def _is_own(self, name: str) -> bool:
        kind, number = name.split(".")[:2]
        if name == self.shared or (name == "norm.weight" and self.config.exits.norm == "shared"):
            return True  # the other stages' share of it is detached
        if kind == "layers":
            return int(number) in self.own_layers
        if kind == "exits":
            return self.stage_of[int(number)] == self.stage
        return name == "embedding.weight" or self.stage_of[self.config.model.num_layers] == self.stage


def _num_microbatches(config: Config) -> int:
    assert config.parallel.data != "auto", "a case says how many data-parallel ranks it has"
    return BATCH_SIZE // config.parallel.data // config.training.micro_batch_size


def samples_of(config: Config, first: int, count: int, iteration: int) -> Samples:
    numbers = range(first, first + count)
    samples = [RandomSamples()[number] for number in numbers]
    tokens, labels, mask = (
        torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")
    )
    drops = config.training.layer_dropout is not None
    skipped = [skipped_layers(config, number, iteration) for number in numbers] if drops else None
    return Samples(tokens, labels, mask, skipped)


def _leaves(parameters: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}


def _adamw(config: Config, parameters: Arrays, gradients: Arrays, norm: float) -> Arrays:
    """One step of torch's AdamW, with clipping; vectors do not decay."""
    settings, leaves = config.optimizer, _leaves(parameters)
    clip = min(1.0, settings.clip_grad_norm / (norm + 1e-6))
    for name, leaf in leaves.items():
        leaf.grad = torch.tensor(gradients[name] * clip)
    groups = [
        {"params": [leaf for leaf in leaves.values() if leaf.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [leaf for leaf in leaves.values() if leaf.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.epsilon).step()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


def _count_syncs(buffers: StageGradients) -> list[int]:
    """Grows when the sum of a bucket's gradients over data ranks is issued."""
    issued: list[int] = []
    for number, group in enumerate(buffers.ddp.bucket_groups):
        original = group.start_grad_sync

        def start(*args: Any, original: Any = original, number: int = number, **kwargs: Any) -> None:
            issued.append(number)
            original(*args, **kwargs)

        group.start_grad_sync = start
    return issued


def _gather_shards(buffers: StageGradients, mesh: Mesh) -> None:
    """With a distributed optimizer each data rank has the sums of its share of a bucket; give all ranks all of them."""
    for group in buffers.ddp.bucket_groups:
        for bucket in group.buckets:
            shards = list(bucket.grad_data.chunk(mesh.data_size))
            own = shards[mesh.data_rank].clone()
            dist.all_gather(shards, own, group=mesh.groups.dp)
