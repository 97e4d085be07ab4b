"""What the tests of this folder run on each rank. Every case takes the device's name first."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from helpers.models import whole_model
from helpers.runs import Records
from helpers.tiny import VOCAB_SIZE

from megatron_ee.checkpoint.staging import Staging
from megatron_ee.config import Config, ExitParams, ParallelConfig
from megatron_ee.device import Device, choose_device
from megatron_ee.inference.decoder import Decoder
from megatron_ee.inference.engine import Engine, load_engine
from megatron_ee.inference.policies import MEASURES, max_probability
from megatron_ee.inference.request import Request
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.pipeline.recorder import Recorder
from megatron_ee.tokenizer import ByteTokenizer
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
    """A checkpoint's parameters as an engine for decoding has them."""
    return _parameters(load_engine(step, config, device_of(name)).stage)


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


def decoding(name: DeviceName) -> dict[str, Any]:
    """How far cached logits are from the full forward's, however tokens are fed and wherever they leave."""
    mesh = open_mesh(ParallelConfig(), device_of(name))
    stage = whole_model(mesh, exits=EXITS)
    tokens = torch.randint(VOCAB_SIZE, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    full = {layer: _full_logits(stage, tokens, layer) for layer in (*EXITS, 8)}
    chunks = {str(sizes): _chunked_distance(stage, tokens, sizes, full[8]) for sizes in ([30], [1] * 30, [9, 1, 15, 5])}
    thresholds = {layer: float(full[layer].softmax(-1).amax(-1).median()) for layer in EXITS}
    decoder = Decoder(stage, thresholds, max_probability, max_pending=4, capacity=64)
    depths, distance = [], 0.0
    for position, token in enumerate(tokens):
        outcome = decoder.feed([token])
        depths.append(outcome.exit_layer)
        distance = max(distance, _distance(outcome.logits_V, full[outcome.exit_layer][position]))
    return {"chunks": chunks, "mixed": distance, "depths": depths}


def generated(name: DeviceName) -> dict[str, list[tuple[int, int]]]:
    """Tokens and exit layers by kind of request."""
    mesh = open_mesh(ParallelConfig(), device_of(name))
    engine = Engine(whole_model(mesh, exits=EXITS), _TinyTokenizer(), EXITS, MEASURES)
    requests = {
        "full": {"exit": ExitParams(mode="full")},
        "threshold 1": {"exit": ExitParams(threshold=1.0)},
        "threshold 0": {"exit": ExitParams(threshold=0.0)},
        "sampled": {"exit": ExitParams(mode="full"), "temperature": 1.0, "top_k": 8, "seed": 3},
        "sampled again": {"exit": ExitParams(mode="full"), "temperature": 1.0, "top_k": 8, "seed": 3},
    }
    answers = {}
    for kind, fields in requests.items():
        request = Request(prompt=(1, 2, 3), max_new_tokens=16, stop=VOCAB_SIZE, **fields)  # type: ignore[arg-type]
        answers[kind] = [(emission.token, emission.exit_layer) for emission in engine.generate(request)]
    return answers


def _parameters(stage: Stage) -> dict[str, Any]:
    return {name: parameter.detach().float().cpu().numpy() for name, parameter in stage.named_parameters()}


def _bytes_of_parameters(trainer: Trainer) -> int:
    """With an fp32 gradient and two moments for each, and an fp32 copy of those in half precision."""
    parameters = list(trainer.stage.parameters())
    return sum(
        parameter.numel() * (parameter.element_size() + 4 + 8 + 4 * (parameter.element_size() < 4))
        for parameter in parameters
    )


def _chunked_distance(stage: Stage, tokens: list[int], sizes: list[int], full_SV: torch.Tensor) -> float:
    decoder, fed, distance = Decoder(stage, {}, max_probability, max_pending=1000, capacity=64), 0, 0.0
    for size in sizes:
        outcome = decoder.feed(tokens[fed : fed + size])
        fed += size
        distance = max(distance, _distance(outcome.logits_V, full_SV[fed - 1]))
    return distance


def _full_logits(stage: Stage, tokens: list[int], layer: int) -> torch.Tensor:
    """[S, V] at an exit, from one pass without a cache."""
    device = next(stage.parameters()).device
    with torch.no_grad():
        positions = torch.arange(len(tokens), device=device)
        _, taps = stage.run_layers(stage.embed(torch.tensor([tokens], device=device)), positions, 0, layer)
        return stage.exit_logits(taps[stage.tap_of(layer)], layer, positions).squeeze(1)


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max())


class _TinyTokenizer(ByteTokenizer):
    vocab_size = VOCAB_SIZE
