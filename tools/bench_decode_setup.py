"""What the measures of decoding share: sizes, the model, prompts, and decoding that keeps what it said."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.data.corpus import documents
from megatron_ee.device import choose_device
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.request import Emission, Request
from megatron_ee.tokenizer import Tokenizer

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.inference.opened import OpenedModel

HELD_OUT = 0.05
"""The share of the corpus's last documents, which training leaves for tests."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it is measured, at one number of sequences. Of all rounds the first is dropped.

    Attributes:
        thresholds: of the largest probability, for every policy for missing keys and values.
        measures: other measures, each with one threshold.
        draft_lengths: of self-speculation, at every exit.
        assisted_rounds, assisted_tokens: rounds beside Hugging Face's own, which is slow, and new tokens in them.
    """

    sequences: int
    prompt_length: int = 32
    new_tokens: int = 128
    full_rounds: int = 16
    exit_rounds: int = 16
    cost_rounds: int = 15
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    measures: tuple[tuple[str, float], ...] = (("margin", 0.8), ("entropy", 0.8), ("cosine", 0.9), ("gate", 0.7))
    draft_lengths: tuple[int, ...] = (1, 2, 3, 4, 6)
    speculation_rounds: int = 10
    assisted_rounds: int = 4
    assisted_tokens: int = 64

    @property
    def capacity(self) -> int:
        return self.prompt_length + self.new_tokens


class Suite(NamedTuple):
    """What each part of the bench measures."""

    full: tuple[Sizes, ...]
    exits: tuple[Sizes, ...]
    speculation: tuple[Sizes, ...]


def suite() -> Suite:
    """Minutes."""
    alone, many = Sizes(1), Sizes(16, new_tokens=64, exit_rounds=6, cost_rounds=7, measures=())
    speculating = replace(many, speculation_rounds=6, draft_lengths=(2, 4))
    return Suite(
        full=(alone, Sizes(16)),
        exits=(alone, many),
        speculation=(alone, replace(speculating, sequences=4), speculating),
    )


def small_suite() -> Suite:
    """Seconds, and no figures."""
    alone = Sizes(
        1,
        prompt_length=5,
        new_tokens=6,
        full_rounds=3,
        exit_rounds=3,
        cost_rounds=2,
        thresholds=(0.1, 0.9),
        draft_lengths=(2,),
        speculation_rounds=3,
        assisted_rounds=2,
        assisted_tokens=6,
    )
    both = alone, replace(alone, sequences=3, measures=())
    return Suite(both, both, both)


@contextmanager
def opened(folder: Path) -> Iterator["OpenedModel"]:
    """The model of a step folder, on one core in fp32."""
    torch.set_num_threads(1)
    with open_decoding_config(folder, ["device=cpu"]) as config:
        device = choose_device("cpu")
        from megatron_ee.inference.loading import load_model
        from megatron_ee.parallel.mesh import close_mesh

        yield load_model(folder, config, device, dtype=torch.float32)
        close_mesh()


class Prompts:
    """Beginnings of lines somewhere in documents that the model was not trained on; the same on every run."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        texts = list(documents())
        self._texts = texts[-int(HELD_OUT * len(texts)) :]
        self._tokenizer, self._length = tokenizer, length

    def of_round(self, number: int, count: int) -> list[tuple[int, ...]]:
        """Other ones in every round."""
        return list(islice(self._drawn(random.Random(number)), count))

    def _drawn(self, generator: random.Random) -> Iterator[tuple[int, ...]]:
        while True:
            text = generator.choice(self._texts)
            start = text.find("\n", generator.randrange(len(text))) + 1
            tokens = self._tokenizer.encode(text[start : start + 32 * self._length])
            if start and len(tokens) >= self._length:
                yield tuple(tokens[: self._length])


class Decoding:
    """Greedy decoding of each round's prompts, with one setting.

    Attributes:
        said: of each round, and of each of its prompts, in order.
    """

    def __init__(self, model: "OpenedModel", prompts: Prompts, sizes: Sizes, exit_params: ExitParams) -> None:
        from megatron_ee.inference.batch import Batch

        self.exit, self._prompts, self._sizes = exit_params, prompts, sizes
        self._batch = Batch(model, slots=sizes.sequences, capacity=sizes.capacity)
        self._sampling = SamplingParams(max_new_tokens=sizes.new_tokens, ignore_eos=True)
        self.said: dict[int, list[list[Emission]]] = {}

    def __call__(self, number: int) -> float:
        """CPU seconds of a round: what else the machine does counts little."""
        prompts = self._prompts.of_round(number, self._sizes.sequences)
        requests = [Request(prompt, self._sampling, self.exit) for prompt in prompts]
        started = time.process_time()
        said = self._decode(requests)
        seconds = time.process_time() - started
        self.said[number] = said
        return seconds

    def _decode(self, requests: Sequence[Request]) -> list[list[Emission]]:
        slots = [self._batch.add(request) for request in requests]
        said: dict[int, list[Emission]] = {slot: [] for slot in slots}
        while emitted := self._step():
            for slot, emission in emitted:
                said[slot].append(emission)
        for slot in slots:
            self._batch.remove(slot)
        return list(said.values())

    def _step(self) -> list[tuple[int, Emission]]:
        return self._batch.step()


def full_depth() -> ExitParams:
    return ExitParams(mode="full")


def context_of(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {"torch": torch.__version__, "transformers": version("transformers")}
    return versions | {"threads": torch.get_num_threads(), "sizes": asdict(sizes)} | more
