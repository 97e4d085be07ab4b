"""Rounds of a server and its model: how much slower the same answers come, and how long others wait beside one client
whose prompts are slowdown inputs.
"""

import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_decode_setup import Prompts
from bench_report import Measure, Rounds, all_take_turns, measure_of, take_turns
from bench_server_setup import FOURTH, OTHERS, Server, Sizes, seconds_of, shared_settings

from megatron_ee.config import SamplingParams
from megatron_ee.inference.llm import LLM

Prompt = tuple[int, ...]


class Found(NamedTuple):
    """Prompts, and the share of their answers' tokens that leave early."""

    normal: list[Prompt]
    slow: list[Prompt]
    normal_share: float
    slow_share: float


class Bench:
    """
    Attributes:
        llm: the same model, with the same settings, in this process.
    """

    def __init__(self, checkpoint: Path, server: Server, sizes: Sizes, threshold: float) -> None:
        torch.set_num_threads(1)
        self.server, self.sizes = server, sizes
        self.llm = LLM(checkpoint, overrides=shared_settings(sizes, threshold))
        self._threshold = threshold

    def generate(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        self.llm.generate(list(prompts), SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))

    def texts(self) -> list[Prompt]:
        """Beginnings of lines that the model was not trained on."""
        prompts = Prompts(self.llm.model.tokenizer, self.sizes.prompt_length)
        return prompts.of_round(0, self.sizes.candidates)

    def find(self) -> Found:
        """Normal prompts are texts whose tokens leave as they mostly do; slowdown inputs are such tokens in an order
        after which the fewest leave."""
        sizes, texts, draw = self.sizes, self.texts(), random.Random(0)
        crafted = [tuple(draw.choice(draw.choice(texts)) for _ in range(sizes.prompt_length)) for _ in texts]
        shares = self._shares([*texts, *crafted])
        by_share = sorted(shares, key=lambda prompt: shares[prompt])
        usual = sorted(set(texts), key=lambda prompt: shares[prompt])
        middle = max(0, (len(usual) - sizes.kept) // 2)
        normal, slow = usual[middle : middle + sizes.kept], by_share[: sizes.kept]
        return Found(normal, slow, *(sum(map(shares.__getitem__, of)) / len(of) for of in (normal, slow)))

    def _shares(self, prompts: list[Prompt]) -> dict[Prompt, float]:
        new_tokens, num_layers = self.sizes.new_tokens, self.llm.config.model.num_layers
        answers = self.llm.generate(list(prompts), SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
        return {
            prompt: sum(layer < num_layers for layer in answer.exit_layers) / new_tokens
            for prompt, answer in zip(prompts, answers, strict=True)
        }

    def context(self, rounds: Rounds, **more: Any) -> dict[str, Any]:
        """What the figures depend on, and those behind the ratios."""
        figures = {"a": rounds.a, "b": rounds.b, "a_again": rounds.again}
        return {"torch": torch.__version__, "threshold": self._threshold, "sizes": asdict(self.sizes)} | figures | more


def speed_measures(bench: Bench) -> list[Measure]:
    """The same greedy answers from the server (A) and from `LLM.generate` (B)."""
    sizes, server, prompts = bench.sizes, bench.server, bench.texts()
    many, alone = prompts[: 2 * sizes.batch], prompts[0]

    def ask_all() -> None:
        with ThreadPoolExecutor(len(many)) as pool:
            list(pool.map(lambda prompt: server.ask(prompt, sizes.new_tokens), many))

    def against(work: Any, prompts: Sequence[Prompt], new_tokens: int) -> Rounds:
        generate = partial(seconds_of, bench.generate, prompts, new_tokens)
        return take_turns(sizes.rounds, partial(seconds_of, work), generate)

    whole = against(ask_all, many, sizes.new_tokens)
    first = against(partial(server.stream, alone, 1), [alone], 1)
    stream = against(partial(server.stream, alone, sizes.new_tokens), [alone], sizes.new_tokens)
    added = [(a - b) / sizes.new_tokens * 1e6 for a, b in zip(stream.a, stream.b, strict=True)]
    to_first = [seconds * 1e3 for seconds in first.a]
    over = [(a - b) * 1e3 for a, b in zip(first.a, first.b, strict=True)]
    return [
        measure_of("server_over_generate", whole.paired, "higher", whole.aa, bench.context(whole)),
        measure_of("server_first_token_ms", to_first, "lower", first.aa, bench.context(first)),
        measure_of("server_beyond_generate_ms", over, "lower", first.aa, bench.context(first)),
        measure_of("server_us_per_streamed_token", added, "lower", stream.aa, bench.context(stream)),
    ]


def slowdown_measures(bench: Bench) -> list[Measure]:
    """What others wait (p99) beside a fourth client whose prompts are slowdown inputs, over beside a normal one."""
    sizes, found = bench.sizes, bench.find()
    answers = (found.normal * sizes.batch)[: 2 * sizes.batch]
    per_second = len(answers) / seconds_of(bench.generate, answers, sizes.new_tokens)
    rate = sizes.load * per_second / (len(OTHERS) + 1)

    def wait(fourth: Sequence[Prompt], number: int) -> float:
        return _p99_of_others(bench, found.normal, fourth, rate, number)

    (rounds,) = all_take_turns(sizes.rounds, partial(wait, found.normal), [partial(wait, found.slow)])
    shares = {"early_share_normal": found.normal_share, "early_share_slow": found.slow_share}
    context = bench.context(rounds, requests_per_second=rate * (len(OTHERS) + 1), **shares)
    return [measure_of("server_p99_beside_slowdown", rounds.paired, "lower", rounds.aa, context, goal=1.2)]


def _p99_of_others(bench: Bench, normal: Sequence[Prompt], fourth: Sequence[Prompt], rate: float, number: int) -> float:
    """Seconds from when a request was due; the same moments for both parts of a round."""
    sizes = bench.sizes
    due: list[tuple[float, str, Prompt]] = []
    for client in (*OTHERS, FOURTH):
        draw, at = random.Random(f"{number} {client}"), 0.0
        for _ in range(sizes.requests):
            at += draw.expovariate(rate)
            due.append((at, client, draw.choice(fourth if client == FOURTH else normal)))
    began = time.perf_counter()

    def answer(client: str, prompt: Prompt, at: float) -> float:
        bench.server.ask(prompt, sizes.new_tokens, client)
        return time.perf_counter() - began - at

    with ThreadPoolExecutor(len(due)) as pool:
        waits = []
        for at, client, prompt in sorted(due):
            time.sleep(max(0.0, began + at - time.perf_counter()))
            waits.append((client, pool.submit(answer, client, prompt, at)))
        seconds = sorted(wait.result() for client, wait in waits if client != FOURTH)
    return seconds[math.ceil(0.99 * len(seconds)) - 1]
