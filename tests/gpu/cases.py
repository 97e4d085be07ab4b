"""What the tests of this folder run on each rank. Every case takes the device's name first."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from helpers.decoding import decode, full_logits, keys_and_values, opened, request, texts_of, tokens_of
from helpers.models import whole_model
from helpers.runs import Records
from helpers.tiny import VOCAB_SIZE

from megatron_ee.checkpoint.staging import Staging
from megatron_ee.config import Config, ExitParams, ParallelConfig
from megatron_ee.device import Device, choose_device
from megatron_ee.inference import depth_walk
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.depth_walk import DepthWalk
from megatron_ee.inference.loading import load_model
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.pipeline.recorder import Recorder
from megatron_ee.training.build import build_trainer
from megatron_ee.training.trainer import Trainer

DeviceName = Literal["cpu", "cuda"]
EXITS = [2, 5]


def device_of(name: DeviceName, *, engine: bool = False) -> Device:
    """The device without its shortcuts: no TF32, and Transformer Engine (whose fp32 is TF32) only when asked for."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return replace(choose_device(name), has_transformer_engine=engine)


def engine_problem(name: DeviceName) -> str | None:
    """Why Transformer Engine cannot be used here, if it cannot."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: built for another CUDA
        return f"Transformer Engine: {error}"
    return None if name == "cuda" else "Transformer Engine needs CUDA"


def copy_to_host(name: DeviceName) -> list[bool]:
    """Whether each copy holds what its original did before that changed, and whether their memory is page-locked."""
    device, generator = device_of(name), torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((512, 1024), (3,), (65, 7))]
    values.append(values[0].bfloat16().T)
    originals = [value.to(device.torch, copy=True) for value in values]
    staging, answers = Staging(device), []
    for _ in range(2):  # the second time to memory that was used before
        copies = staging.copy(originals)
        for original in originals:
            original.add_(1)
        answers += [torch.equal(copy, value) for copy, value in zip(copies, values, strict=True)]
        values = [original.cpu().clone() for original in originals]
    return [*answers, copies[0].is_pinned() == (name == "cuda")]


def train_on(
    name: DeviceName, config: Config, until: int | None = None, *, save: bool = False, engine: bool = False
) -> dict[str, Any]:
    """Train; figures by iteration (of the main rank), the final parameters, and where they are."""
    trainer = build_trainer(config, device_of(name, engine=engine))
    started_at = trainer.progress.iteration
    records = Records()
    trainer.loggers = [records] if trainer.mesh.is_main else []
    trainer.train(until)
    if save:
        trainer.save()
    return {
        "started_at": started_at,
        "figures": records.figures,
        "parameters": _parameters(trainer.stage),
        "device": next(trainer.stage.parameters()).device.type,
        "backend": torch.distributed.get_backend(),
    }


def train_on_engine(name: DeviceName, config: Config, until: int | None = None) -> dict[str, Any]:
    """`train_on` with Transformer Engine's layers; saves."""
    return train_on(name, config, until, save=True, engine=True)


def train_and_save(name: DeviceName, config: Config, until: int | None = None) -> dict[str, Any]:
    return train_on(name, config, until, save=True)


def read(name: DeviceName, step: Path, config: Config) -> dict[str, Any]:
    """A checkpoint's parameters as they are decoded with."""
    return _parameters(load_model(step, config, device_of(name)).stage)


def recorded_spans(name: DeviceName, config: Config) -> int:
    """How many spans a runtime that times its actions records in a step."""
    trainer = build_trainer(config, device_of(name))
    recorder = Recorder(trainer.mesh.device)
    trainer.train_step(trainer.loader.batch(0), 0, watches=[recorder])
    return len(recorder.spans)


def memory_of_a_step(name: DeviceName, config: Config) -> dict[str, int]:
    """Bytes: the most that a run holds during its second step (the first makes the optimizer's state), and what its
    parameters, their gradients and the optimizer's state take of it."""
    device = device_of(name)
    gc.collect()  # an earlier case's trainer
    before = torch.cuda.memory_allocated() if name == "cuda" else 0
    trainer = build_trainer(config, device)
    trainer.loggers = []
    batch = trainer.loader.batch(0)
    trainer.train_step(batch, 0)
    if name == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train_step(batch, 1)
    device.synchronize()
    return {"peak": device.peak_memory_bytes() - before, "parameters": _bytes_of_parameters(trainer)}


def allowance_for_exits(config: Config) -> int:
    """Bytes that exits may add beside their heads: at each, the gradient of one micro-batch's hidden state (a single
    stage has one micro-batch in flight)."""
    hidden = config.data.sequence_length * config.training.micro_batch_size * config.model.hidden_size
    return len(config.exits.layers) * hidden * DTYPES[config.training.precision].itemsize


def cached_logits(name: DeviceName) -> dict[str, float]:
    """How far cached logits are from the full forward's, by the numbers of tokens that are fed together."""
    model = _opened(name)
    tokens = _tokens(30)
    full_SV = full_logits(model.stage, tokens, 8)
    return {str(sizes): _distance_in_chunks(model, tokens, sizes, full_SV) for sizes in ([30], [1] * 30, [9, 1, 15, 5])}


def decoded_at_mixed_depths(name: DeviceName, policy: str) -> dict[str, Any]:
    """A ragged batch whose rows leave at all depths: texts, how far its flushed keys and values are from those of
    full depth, and where each is kept."""
    model = _opened(name)
    full = {layer: full_logits(model.stage, _tokens(40), layer).softmax(-1).amax(-1) for layer in EXITS}
    params = ExitParams(
        thresholds={layer: float(of.median()) for layer, of in full.items()}, kv_policy=policy, max_pending=6
    )
    requests = [request(_tokens(length, seed=length), params) for length in (3, 9, 1, 14)]
    batch = Batch(model, slots=4, capacity=64, max_pending=6, prefill_chunk=8)
    texts = decode(batch, requests)
    batch.flush(range(4))
    distance = 0.0
    for slot, (of, text) in enumerate(zip(requests, texts, strict=True)):
        tokens = [*of.prompt, *tokens_of(text)][:-1]
        expected = keys_and_values(model.stage, tokens)
        for number in range(1, 9):
            actual = batch.walk.cache.read(number, slot, len(tokens))
            distance = max(
                distance, *(_distance(ours, theirs) for ours, theirs in zip(actual, expected[number], strict=True))
            )
    return {
        "texts": [[(emission.token, emission.exit_layer) for emission in text] for text in texts],
        "distance": distance,
        "device": batch.walk.cache.of(1).device.type,
    }


def decoded_through_graphs(name: DeviceName) -> dict[str, Any]:
    """A ragged batch at mixed depths, with CUDA graphs where they are and without them."""
    model = _opened(name)
    full = {layer: full_logits(model.stage, _tokens(41), layer).softmax(-1).amax(-1) for layer in EXITS}
    params = ExitParams(thresholds={layer: float(of.median()) for layer, of in full.items()})
    requests = [request(_tokens(length, seed=length), params, max_new_tokens=24) for length in (50, 9, 1)]

    def run() -> tuple[Batch, list[list[tuple[int, int]]]]:
        batch = Batch(model, slots=4, capacity=96)
        texts = decode(batch, requests)
        batch.flush(range(3))
        return batch, [[(emission.token, emission.exit_layer) for emission in text] for text in texts]

    batch, texts = run()
    with patch.object(depth_walk, "capture_on", return_value=None):
        plain, plain_texts = run()
    both = [(batch.walk.cache.of(number), plain.walk.cache.of(number)) for number in range(1, 9)]
    graphs = batch.walk._graphs
    return {
        "same": texts == plain_texts,
        "depths": sorted({layer for text in texts for _, layer in text}),
        "distance": max(_distance(ours[..., :-1, :], theirs[..., :-1, :]) for ours, theirs in both),
        "graphs": 0 if graphs is None else graphs.num_graphs,
    }


def generated(name: DeviceName) -> dict[str, list[tuple[int, int]]]:
    """Tokens and exit layers by kind of request."""
    model = _opened(name)
    kinds = {
        "full": request((1, 2, 3), ExitParams(mode="full")),
        "threshold 1": request((1, 2, 3), ExitParams(threshold=1.0)),
        "threshold 0": request((1, 2, 3), ExitParams(threshold=0.0)),
        "sampled": request((1, 2, 3), ExitParams(mode="full"), temperature=1.0, top_k=8, seed=3),
        "sampled again": request((1, 2, 3), ExitParams(mode="full"), temperature=1.0, top_k=8, seed=3),
    }
    texts = texts_of(model, list(kinds.values()))
    return {
        kind: [(emission.token, emission.exit_layer) for emission in text]
        for kind, text in zip(kinds, texts, strict=True)
    }


def _opened(name: DeviceName) -> OpenedModel:
    return opened(whole_model(open_mesh(ParallelConfig(), device_of(name)), exits=EXITS))


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _parameters(stage: Stage) -> dict[str, Any]:
    return {name: parameter.detach().float().cpu().numpy() for name, parameter in stage.named_parameters()}


def _bytes_of_parameters(trainer: Trainer) -> int:
    """With an fp32 gradient and two moments for each, and an fp32 copy of those in half precision."""
    parameters = list(trainer.stage.parameters())
    return sum(
        parameter.numel() * (parameter.element_size() + 4 + 8 + 4 * (parameter.element_size() < 4))
        for parameter in parameters
    )


@torch.inference_mode()
def _distance_in_chunks(model: OpenedModel, tokens: list[int], sizes: list[int], full_SV: torch.Tensor) -> float:
    walk, fed, distance = DepthWalk(model.runner, model.exits, slots=1, capacity=64, room=64), 0, 0.0
    walk.ledger.open(0)
    for size in sizes:
        logits_1V = walk.enter({0: tokens[fed : fed + size]}, 8).ask([0]).logits
        fed += size
        distance = max(distance, _distance(logits_1V[0], full_SV[fed - 1]))
    return distance


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max())
