"""What a step of each config takes over a step without exits, on one core: configs take turns in one process."""

import statistics
from typing import TYPE_CHECKING, Any

import torch
from bench_report import all_take_turns
from bench_train_setup import cpu_seconds, random_batch
from reproduce_runs import CONFIGS

from megatron_ee.config import load_config
from megatron_ee.device import choose_device

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.training.trainer import Trainer

ROUNDS = 9
ITERATION = 500
"""Of the step that is timed: every weight has warmed up."""
COMPARED = (
    "quarter_and_half",
    "every_second",
    "mlp_heads",
    "block_heads",
    "own_projections",
    "layerskip",
    "layerskip_gradual",
    "dropout_30",
)


def measure_costs(*, quick: bool) -> dict[str, Any]:
    """CPU seconds of a step of 1024 tokens without exits; for each config the median ratio over it, with its 10th and
    90th percentile, and the parameters that it has more; `aa` is the step without exits over itself."""
    device = choose_device("cpu")
    from bench_gpu import build

    from megatron_ee.config import ParallelConfig
    from megatron_ee.parallel.mesh import close_mesh, open_mesh

    torch.set_num_threads(1)
    mesh = open_mesh(ParallelConfig(), device)
    sizes = ["device=cpu", "training.global_batch_size=4", "training.micro_batch_size=4"]
    if quick:
        sizes += ["model.hidden_size=64", "model.vocab_size=512", "data.sequence_length=32"]
    trainers = {name: build(load_config(CONFIGS / f"{name}.yaml", sizes), mesh) for name in ("none", *COMPARED)}
    timed = all_take_turns(
        3 if quick else ROUNDS, _Step(trainers["none"]), [_Step(trainers[name]) for name in COMPARED]
    )
    close_mesh()
    parameters = {name: sum(of.numel() for of in trainer.stage.parameters()) for name, trainer in trainers.items()}
    model = trainers["none"].config.model
    layers = sum(of.numel() for of in trainers["none"].stage.layers.parameters())
    return {
        "layer_parameters": layers // model.num_layers,
        "head_parameters": int(model.vocab_size) * model.hidden_size,
        "seconds": statistics.median(timed[0].a),
        "aa": timed[0].aa,
        "steps": {
            name: {**_spread(of.paired), "more_parameters": parameters[name] - parameters["none"]}
            for name, of in zip(COMPARED, timed, strict=True)
        },
    }


class _Step:
    """A step on the same tokens each time."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer, self._batch = trainer, random_batch(trainer.config)

    def __call__(self, number: int) -> float:
        return cpu_seconds(lambda: self._trainer.train_step(self._batch, ITERATION + number))


def _spread(ratios: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"ratio": statistics.median(ratios), "low": low, "high": high}
