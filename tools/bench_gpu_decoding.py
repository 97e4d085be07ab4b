"""The decoding part of the GPU bench: full depth, early exits, and vLLM beside them where it is installed."""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from bench_gpu_vllm import VllmChild, is_vllm_installed
from bench_report import Measure, measure_of, take_turns

from megatron_ee.config import ExitParams, SamplingParams

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.inference.opened import OpenedModel
    from megatron_ee.training.trainer import Trainer

THRESHOLD = 0.5
PERIOD = 64  # tokens count up and begin again: learnt within seconds, so that exits become confident
FULL = ExitParams(mode="full")


@dataclass(frozen=True, slots=True)
class DecodingSizes:
    """What is measured.

    Attributes:
        batches: numbers of sequences that are decoded together.
        rounds: the first is dropped.
    """

    batches: tuple[int, ...] = (1, 16)
    new_tokens: int = 128
    rounds: int = 7


def decoding_measures(sizes: DecodingSizes, trainer: "Trainer", context: dict[str, Any]) -> list[Measure]:
    """Tokens per second of greedy requests, in batches of several sizes."""
    model = open_for_decoding(trainer)
    context = context | {"vllm": "not measured" if is_vllm_installed() else "not installed"}
    measures = []
    for batch in sizes.batches:
        measures += early_exit_measures(sizes, model, batch, context)
    is_cuda = next(model.stage.parameters()).is_cuda
    if is_cuda:
        measures += [graphs_measure(sizes, model, batch, context) for batch in sizes.batches]
    if is_vllm_installed() and is_cuda:
        with tempfile.TemporaryDirectory() as folder:
            write_huggingface(trainer, Path(folder))
            for batch in sizes.batches:
                measures.append(vllm_measure(sizes, model, Path(folder), batch, context))
    return measures


def early_exit_measures(
    sizes: DecodingSizes, model: "OpenedModel", batch: int, context: dict[str, Any]
) -> list[Measure]:
    """Full depth, and exits of this threshold over it."""
    decoding = Decoding(model, batch, sizes.new_tokens)
    exiting = ExitParams(threshold=THRESHOLD)
    rounds = take_turns(sizes.rounds, lambda: decoding.seconds(FULL), lambda: decoding.seconds(exiting))
    decoding.seconds(exiting)
    depths = decoding.depths
    by_exit = {str(layer): depths.count(layer) for layer in sorted(set(depths))}
    context = context | {"batch": batch}
    exits = context | {"threshold": THRESHOLD, "mean_depth": statistics.mean(depths), "tokens_by_exit": by_exit}
    full, early = ([batch * sizes.new_tokens / seconds for seconds in times] for times in (rounds.a, rounds.b))
    speed, of_threshold = [1 / ratio for ratio in rounds.paired], f"threshold_{THRESHOLD}_batch_{batch}"
    return [
        measure_of(f"decode_tokens_per_s_full_depth_batch_{batch}", full, "higher", rounds.aa, context),
        measure_of(f"decode_tokens_per_s_{of_threshold}", early, "higher", rounds.aa, exits),
        measure_of(f"decode_speed_ratio_{of_threshold}", speed, "higher", rounds.aa, exits),
    ]


def graphs_measure(sizes: DecodingSizes, model: "OpenedModel", batch: int, context: dict[str, Any]) -> Measure:
    """Full depth through CUDA graphs, over full depth without."""
    from megatron_ee.inference import depth_walk

    with patch.object(depth_walk, "capture_on", return_value=None):
        without = Decoding(model, batch, sizes.new_tokens)
    having = Decoding(model, batch, sizes.new_tokens)
    rounds = take_turns(sizes.rounds, lambda: without.seconds(FULL), lambda: having.seconds(FULL))
    name, speed = f"decode_speed_ratio_cuda_graphs_batch_{batch}", [1 / ratio for ratio in rounds.paired]
    return measure_of(name, speed, "higher", rounds.aa, context | {"batch": batch})


def vllm_measure(
    sizes: DecodingSizes, model: "OpenedModel", folder: Path, batch: int, context: dict[str, Any]
) -> Measure:
    """Our full depth over vLLM's, on the same prompts and the same parameters."""
    decoding = Decoding(model, batch, sizes.new_tokens)
    with VllmChild(folder, prompts(batch), sizes.new_tokens) as vllm:
        rounds = take_turns(sizes.rounds, lambda: decoding.seconds(FULL), vllm.seconds)
        context = context | {"batch": batch, "vllm": vllm.version}
    return measure_of(f"decode_speed_ratio_vllm_batch_{batch}", rounds.paired, "higher", rounds.aa, context)


def open_for_decoding(trainer: "Trainer") -> "OpenedModel":
    """What has been trained, on its own stage."""
    from megatron_ee.inference.measures import MEASURES
    from megatron_ee.inference.opened import OpenedModel

    stage = trainer.stage.eval()
    return OpenedModel(stage, trainer.tokenizer, tuple(trainer.config.exits.layers), MEASURES)


def prompts(batch: int) -> list[list[int]]:
    """Beginnings that count up, of unequal length, each from another start."""
    return [[(start + step) % PERIOD for step in range(PERIOD // 2 + start % 8)] for start in range(batch)]


class Decoding:
    """The same requests again and again in one batch, whose graphs are recorded in the first round.

    Attributes:
        depths: the exit layer of each new token of the last time.
    """

    def __init__(self, model: "OpenedModel", batch: int, new_tokens: int) -> None:
        from megatron_ee.inference.batch import Batch

        self._batch = Batch(model, slots=batch, capacity=PERIOD + new_tokens)
        self._new_tokens, self._size = new_tokens, batch
        self.depths: list[int] = []

    def seconds(self, params: ExitParams) -> float:
        """Choices reach the host step by step, so no clock runs ahead."""
        from megatron_ee.inference.request import Request

        started = time.perf_counter()
        sampling = SamplingParams(max_new_tokens=self._new_tokens)
        slots = [self._batch.add(Request(tuple(prompt), sampling, params)) for prompt in prompts(self._size)]
        self.depths = [emission.exit_layer for _ in range(self._new_tokens) for _, emission in self._batch.step()]
        for slot in slots:
            self._batch.remove(slot)
        return time.perf_counter() - started


def write_huggingface(trainer: "Trainer", folder: Path) -> None:
    """The trained model without its exits, as transformers and vLLM read it."""
    from megatron_ee.huggingface.architecture import config_json_of
    from megatron_ee.huggingface.names import recipes_of
    from megatron_ee.huggingface.writing import plan_shards, write_model

    config, stage = trainer.config, trainer.stage
    parameters = {stage.global_name(name): parameter for name, parameter in stage.named_parameters()}
    recipes = recipes_of(config.model)
    makers = {tensor: recipe for recipe in recipes.values() for tensor in recipe.tensors}
    shapes = {tensor: recipe.tensors[tensor] for tensor, recipe in makers.items()}

    def produce(tensor: str) -> list[torch.Tensor]:
        whole = parameters[makers[tensor].name].detach().cpu()
        return [whole[piece.start : piece.stop] for piece in makers[tensor].back(tensor)]

    precision = config.training.precision
    write_model(folder, plan_shards(shapes, precision, 5 * 10**9), precision, produce)
    content = config_json_of(config.model, precision, positions=config.data.sequence_length)
    (folder / "config.json").write_text(json.dumps(content | {"bos_token_id": None, "eos_token_id": None}))
