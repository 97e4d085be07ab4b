"""Full depth against exits, on a user's own prompts: what exits gain and what they cost. Imports no torch."""

import time
from collections.abc import Iterator, Sequence
from typing import get_args

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.config.inference import KvPolicy
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.llm import LLM
from megatron_ee.inference.request import Emission
from megatron_ee.inference.show import Summary

COMPARED_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)


def compare(llm: LLM, prompts: Sequence[Prompt], *, all_policies: bool) -> None:
    """Print a table: a row for full depth and for each threshold, over all prompts, decoded greedily in batches.

    `agreement` is the share of tokens that full depth would have chosen too, given the same text before them.

    Args:
        all_policies: each threshold has a row for every KV policy, not for the config's alone.
    """
    sampling = _greedy(llm.config.inference.sampling)
    list(llm.stream(list(prompts), sampling.model_copy(update={"max_new_tokens": 8})))  # the first tokens are slow
    rows = list(_rows(llm.config.inference.exit, all_policies=all_policies))
    width = max(len(name) for name, _ in rows) + 2
    print(f"{'':{width}}{'mean depth':>10}{'agreement':>12}{'tokens/s':>12}{'speed':>8}   tokens by exit layer")
    full_speed = None
    for name, params in rows:
        summary, agreement = _measure(llm, prompts, sampling, params)
        speed = summary.tokens_per_second
        full_speed = full_speed or speed
        print(
            f"{name:{width}}{summary.mean_depth:>10.2f}{agreement:>12.1%}{speed:>12.1f}{speed / full_speed:>7.2f}x   "
            f"{summary.exits_used()}"
        )


def _greedy(sampling: SamplingParams) -> SamplingParams:
    """Nothing moves a token from the likeliest one, which is what full depth is asked for."""
    ends = ("max_new_tokens", "stop", "stop_token_ids", "ignore_eos")
    return SamplingParams(**{name: getattr(sampling, name) for name in ends})


def _rows(base: ExitParams, *, all_policies: bool) -> Iterator[tuple[str, ExitParams]]:
    yield "full depth", base.model_copy(update={"mode": "full"})
    for threshold in COMPARED_THRESHOLDS:
        changed = base.model_copy(update={"mode": "early_exit", "threshold": threshold, "thresholds": {}})
        for policy in get_args(KvPolicy) if all_policies else (base.kv_policy,):
            name = f"threshold {threshold}" + (f", {policy}" if all_policies else "")
            yield name, changed.model_copy(update={"kv_policy": policy})


def _measure(
    llm: LLM, prompts: Sequence[Prompt], sampling: SamplingParams, params: ExitParams
) -> tuple[Summary, float]:
    """Decode all prompts; the share of tokens that full depth agrees with is measured outside the clock."""
    started = time.perf_counter()
    texts = llm.generate(list(prompts), sampling, params)
    seconds = time.perf_counter() - started
    emissions: list[Emission] = []
    agreed = 0
    for text in texts:
        choices = llm.model.full_depth_choices([*text.prompt, *text.tokens])[len(text.prompt) - 1 : -1]
        agreed += sum(token == choice for token, choice in zip(text.tokens, choices, strict=True))
        emissions += text.emissions
    return Summary(emissions, seconds), agreed / len(emissions)
