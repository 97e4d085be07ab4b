"""What exits cost and what they save on one GPU: training, memory, decoding. Writes runs/bench/gpu.json.

The model with exits and the one without take turns in one process: a round is (without, with, without), in the opposite
order in every other round. A ratio is the median over rounds, and without/without of the same rounds, beside it as
`aa`, says how much of it is noise.
"""

import argparse
import gc
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_gpu_decoding import PERIOD, DecodingSizes, decoding_measures
from bench_report import Measure, measure_of, table, take_turns, write

from megatron_ee.config import Config
from megatron_ee.device import Device, choose_device
from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.data.batch import Batch
    from megatron_ee.parallel.mesh import Mesh
    from megatron_ee.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; by default a model of 400 million parameters."""

    num_layers: int = 24
    hidden_size: int = 1024
    num_attention_heads: int = 16
    vocab_size: int = 32768
    exits: tuple[int, ...] = (6, 12)
    sequence_length: int = 1024
    micro_batch_size: int = 4
    global_batch_size: int = 16
    rounds: int = 20  # the first is dropped
    decoding: DecodingSizes = DecodingSizes()
    learning_steps: int = 100  # at most, before decoding


SMALL = Sizes(4, 32, 4, 320, (1, 2), 16, 1, 2, 6, DecodingSizes((1, 3), 4, 3), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: only to try the program itself")
    parser.add_argument("--small", action="store_true", help="a tiny model and few rounds: seconds, and no figures")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu.json"), metavar="FILE")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        device = choose_device(arguments.device)
    except UserError as error:
        print(f"{error}. `--device cpu --small` tries the program without one", file=sys.stderr)
        return 2
    print(device.reason)
    measures = run(SMALL if arguments.small else Sizes(), device)
    write(measures, arguments.output)
    print(table(measures))
    print(f"written to {arguments.output}")
    return 0


def run(sizes: Sizes, device: Device) -> list[Measure]:
    """Every measure that this device allows: a CPU has neither a known peak nor a mark of its memory to reset."""
    from megatron_ee.config import ParallelConfig
    from megatron_ee.parallel.mesh import close_mesh, open_mesh

    mesh = open_mesh(ParallelConfig(), device)
    load_libraries(device)
    batch = counting_batch(sizes, device)
    context = describe(sizes, device)
    without, static_without = build_and_warm_up(config_of(sizes, ()), mesh, batch)
    having, static_having = build_and_warm_up(config_of(sizes, sizes.exits), mesh, batch)
    measures = training_measures(sizes, without, having, batch, context)
    if device.torch.type == "cuda":
        measures.append(memory_measure(sizes, (without, static_without), (having, static_having), batch, context))
    learn(having, batch, sizes.learning_steps)
    measures += decoding_measures(sizes.decoding, having, context)
    close_mesh()
    return measures


def load_libraries(device: Device) -> None:
    """Matrix products keep a workspace for good: not at the expense of the model that is built first."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, dtype=dtype, device=device.torch, requires_grad=True)
        torch.autograd.backward((x @ x).sum())


def config_of(sizes: Sizes, exits: tuple[int, ...]) -> Config:
    """A run in bf16 on one process."""
    return Config.model_validate(
        {
            "name": "bench",
            "model": {
                "num_layers": sizes.num_layers,
                "hidden_size": sizes.hidden_size,
                "num_attention_heads": sizes.num_attention_heads,
                "vocab_size": sizes.vocab_size,
            },
            "exits": {"layers": exits, "weight_schedule": {"shape": "constant"}},
            "data": {"sequence_length": sizes.sequence_length},
            "training": {
                "train_iters": 1000,
                "global_batch_size": sizes.global_batch_size,
                "micro_batch_size": sizes.micro_batch_size,
                "precision": "bf16",
                "eval_iters": 0,
            },
            "optimizer": {"lr": 1e-3, "lr_decay": "constant"},
        }
    )


def build_and_warm_up(config: Config, mesh: "Mesh", batch: "Batch") -> tuple["Trainer", int]:
    """A trainer after two steps, and the bytes of the GPU's memory that it keeps between steps."""
    device = mesh.device
    before = _allocated(device)
    trainer = build(config, mesh)
    for _ in range(2):
        step(trainer, batch)
    gc.collect()
    return trainer, _allocated(device) - before


def build(config: Config, mesh: "Mesh") -> "Trainer":
    """A trainer without data or files. `build_trainer` would open a mesh for each, and two share this one."""
    from megatron_ee.data.dataset import Datasets
    from megatron_ee.parallel.layout import layout_of
    from megatron_ee.tokenizer import BYTES, open_tokenizer
    from megatron_ee.training.assemble import assemble_trainer
    from megatron_ee.training.planning import plan_step

    vocab_size, training = int(config.model.vocab_size), config.training
    layout = layout_of(config, vocab_size)
    plan = plan_step(config, layout, vocab_size, training.global_batch_size // training.micro_batch_size)
    tokenizer, nothing = open_tokenizer(BYTES), Datasets([], None)
    return assemble_trainer(config, mesh, tokenizer, nothing, vocab_size=vocab_size, layout=layout, plan=plan)


def counting_batch(sizes: Sizes, device: Device) -> "Batch":
    """Sequences that count up modulo PERIOD, each from another start."""
    from megatron_ee.data.batch import Batch

    starts = torch.arange(sizes.global_batch_size).view(-1, sizes.micro_batch_size, 1)
    counting_MBS = ((starts + torch.arange(sizes.sequence_length + 1)) % PERIOD).to(device.torch)
    mask_MBS = torch.ones(counting_MBS[..., 1:].shape, device=device.torch)
    return Batch(counting_MBS[..., :-1].contiguous(), counting_MBS[..., 1:].contiguous(), mask_MBS)


def step(trainer: "Trainer", batch: "Batch") -> float:
    """Seconds of a training step."""
    device = trainer.mesh.device
    device.synchronize()
    started = time.perf_counter()
    trainer.train_step(batch, 0)
    device.synchronize()
    return time.perf_counter() - started


def learn(trainer: "Trainer", batch: "Batch", max_steps: int) -> None:
    """Train until every exit is good at counting: an untrained one would never leave early."""
    weights = dict.fromkeys([*trainer.config.exits.layers, trainer.config.model.num_layers], 1.0)
    for _ in range(max_steps):
        trainer.meter.read("train", weights)
        step(trainer, batch)
        figures = trainer.meter.read("train", weights)
        if all(figures[f"train/exit_{layer}/loss"] < 0.1 for layer in weights):
            return


def training_measures(
    sizes: Sizes, without: "Trainer", having: "Trainer", batch: "Batch", context: dict[str, Any]
) -> list[Measure]:
    """The step with exits, and its time over that of the step without."""
    from megatron_ee.training.observation.throughput import flops_per_token, peak_flops

    configs = without.config, having.config
    flops = [flops_per_token(config, sizes.vocab_size) for config in configs]
    rounds = take_turns(sizes.rounds, lambda: step(without, batch), lambda: step(having, batch))
    milliseconds = [1e3 * seconds for seconds in rounds.b]
    per_second = [sizes.global_batch_size * sizes.sequence_length / seconds for seconds in rounds.b]
    paired = context | {"flops_ratio": flops[1] / flops[0]}  # what the ratio of times would be at equal efficiency
    measures = [
        measure_of("train_step_ms", milliseconds, "lower", rounds.aa, context),
        measure_of("train_tokens_per_s", per_second, "higher", rounds.aa, context),
        measure_of("train_step_ratio_with_exits", rounds.paired, "lower", rounds.aa, paired),
    ]
    name = having.mesh.device.gpu_name
    peak = peak_flops(name) if name is not None else None
    if peak is not None:
        utilisation = [tokens * flops[1] / peak for tokens in per_second]
        measures.append(measure_of("train_mfu", utilisation, "higher", rounds.aa, context | {"peak_flops": peak}))
    return measures


def memory_measure(
    sizes: Sizes, without: tuple["Trainer", int], having: tuple["Trainer", int], batch: "Batch", context: dict[str, Any]
) -> Measure:
    """Peak memory with exits over that without, beyond what they must add: their heads, and the gradient of the hidden
    state at each while its micro-batch is in flight (a single stage has one in flight)."""
    dtype = next(having[0].stage.parameters()).dtype
    heads = _num_parameters(having[0]) - _num_parameters(without[0])
    copies = dtype.itemsize + 4 + 4 + 8  # itself, its fp32 gradient and fp32 copy, two moments
    hidden = sizes.sequence_length * sizes.micro_batch_size * sizes.hidden_size * dtype.itemsize
    allowance = heads * copies + len(sizes.exits) * hidden
    peaks = [static + peak_of_a_step(trainer, batch) for trainer, static in (without, having, without)]
    ratio = (peaks[1] - allowance) / peaks[0]
    details = {"bytes_without": peaks[0], "bytes_with": peaks[1], "bytes_allowed": allowance}
    aa = peaks[2] / peaks[0]
    return measure_of("peak_memory_ratio_with_exits", [ratio], "lower", aa, context | details, goal=1.03)


def peak_of_a_step(trainer: "Trainer", batch: "Batch") -> int:
    """Bytes of the GPU's memory that a step needs beside what is there before it."""
    gc.collect()
    before = _allocated(trainer.mesh.device)
    torch.cuda.reset_peak_memory_stats()
    step(trainer, batch)
    return trainer.mesh.device.peak_memory_bytes() - before


def describe(sizes: Sizes, device: Device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": device.gpu_name or "CPU",
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "transformer_engine": device.has_transformer_engine,
        "precision": "bf16",
        "sizes": asdict(sizes),
    }


def _num_parameters(trainer: "Trainer") -> int:
    return sum(parameter.numel() for parameter in trainer.stage.parameters())


def _allocated(device: Device) -> int:
    return torch.cuda.memory_allocated(device.torch) if device.torch.type == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
