"""What a training step costs in memory and in time, and how fast the trainer is beside other ways to train the model.

Ratios of compute are of CPU time, both sides in turns in this process; runtimes and their waits are of wall time.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_gpu import build
from bench_report import Measure, measure_of, table, take_turns, write
from bench_train_loops import PlainLoop, huggingface_loop, plain_loop
from bench_train_loss import loss_measures
from bench_train_memory import memory_measures
from bench_train_runtimes import runtime_measures
from bench_train_setup import SMALL, Sizes, config_of, context_of, cpu_seconds, random_batch

from megatron_ee.config import ParallelConfig
from megatron_ee.device import choose_device
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:
    from megatron_ee.parallel.mesh import Mesh


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few rounds: seconds, and no figures")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the measures, as json")
    arguments = parser.parse_args()
    quiet_dependencies()
    measures = model_measures(small=arguments.small)
    if arguments.output:
        write(measures, arguments.output)
    print(table(measures))
    return 0


def model_measures(small: bool) -> list[Measure]:
    """Memory with exits; the loss; the trainer beside plain loops; its runtime beside megatron-core's."""
    sizes = SMALL if small else Sizes()
    device = choose_device("cpu")
    from megatron_ee.parallel.mesh import close_mesh, open_mesh

    mesh = open_mesh(ParallelConfig(), device)
    measures = memory_measures(sizes, mesh) + loss_measures(sizes, mesh) + loop_measures(sizes, mesh)
    close_mesh()
    return measures + runtime_measures(sizes)


def loop_measures(sizes: Sizes, mesh: "Mesh") -> list[Measure]:
    """The trainer's tokens per second over those of loops that train the same model from the same parameters."""
    measure = partial(_over_loop, sizes=sizes, mesh=mesh)
    return [
        measure("trainer_over_plain_loop", plain_loop, exits=sizes.two_exits, goal=1.05),
        measure("trainer_over_plain_loop_without_exits", plain_loop, exits=(), goal=1.05),
        measure("trainer_over_huggingface_model", huggingface_loop, exits=(), goal=1.10),
    ]


def _over_loop(
    name: str, make_loop: Any, *, exits: tuple[int, ...], goal: float, sizes: Sizes, mesh: "Mesh"
) -> Measure:
    config = config_of(sizes, exits, num_microbatches=sizes.num_microbatches)
    batch, trainer = random_batch(config), build(config, mesh)
    loop: PlainLoop = make_loop(config, _state(trainer.stage))
    losses = [loop.step(batch) for _ in range(2)]
    trainer.train_step(batch, 0)
    trainer.train_step(batch, 1)
    weights = {**dict(zip(exits, config.exits.weights, strict=True)), config.model.num_layers: 1.0}
    own = trainer.meter.read("train", weights)["train/loss"]
    assert abs(own - statistics.mean(losses)) < 1e-3, f"not the same training: {own} and {losses}"
    rounds = take_turns(
        sizes.rounds,
        lambda: cpu_seconds(lambda: trainer.train_step(batch, 0)),
        lambda: cpu_seconds(lambda: loop.step(batch)),
    )
    tokens = config.training.global_batch_size * sizes.sequence_length
    context = context_of(sizes, exits=exits, tokens_per_cpu_second=tokens / statistics.median(rounds.a))
    return measure_of(name, rounds.paired, "higher", rounds.aa, context, goal=goal)


def _state(stage: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in stage.state_dict().items() if isinstance(value, torch.Tensor)}


if __name__ == "__main__":
    sys.exit(main())
