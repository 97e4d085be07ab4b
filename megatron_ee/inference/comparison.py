"""Full depth against exits, on a user's own prompts: what exits gain and what they cost. Imports no torch."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import get_args

from megatron_ee.config import ExitParams, KvPolicy, SamplingParams
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.completion import Completion
from megatron_ee.inference.llm import LLM
from megatron_ee.inference.show import Summary

COMPARED_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)
ROUNDS = 3
_FULL = "full depth"


def compare(llm: LLM, prompts: Sequence[Prompt], *, all_policies: bool) -> None:
    """Print a table: a row for full depth, for each threshold and for speculation, over all prompts, decoded greedily
    in batches.

    `agreement` is the share of tokens that full depth would have chosen too, given the same text before them. Times are
    the shortest of a few rounds over all rows: other work on the machine only ever adds to one.

    Args:
        all_policies: each threshold has a row for every KV policy, not for the config's alone.
    """
    sampling = greedy(llm.config.inference.sampling)
    rows = dict(_rows(llm.config.inference.exit, llm.model.exits, all_policies=all_policies))
    texts: dict[str, list[Completion]] = {}
    seconds = dict.fromkeys(rows, math.inf)
    for _ in range(ROUNDS):
        for name, params in rows.items():
            started = time.perf_counter()
            texts[name] = llm.generate(list(prompts), sampling, params)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    width = max(map(len, rows)) + 2
    print(f"{'':{width}}{'mean depth':>10}{'agreement':>12}{'tokens/s':>12}{'speed':>8}   tokens by exit layer")
    full_speed = _summary(texts[_FULL], seconds[_FULL]).tokens_per_second
    for name, of in texts.items():
        summary = _summary(of, seconds[name])
        speed = summary.tokens_per_second
        drafts = f"; drafted {drafts}" if (drafts := summary.drafts()) else ""
        print(
            f"{name:{width}}{summary.mean_depth:>10.2f}{agreement(llm, of):>12.1%}{speed:>12.1f}"
            f"{speed / full_speed:>7.2f}x   {summary.exits_used()}{drafts}"
        )


def greedy(sampling: SamplingParams) -> SamplingParams:
    """Nothing moves a token from the likeliest one, which is what full depth is asked for."""
    ends = ("max_new_tokens", "stop", "stop_token_ids", "ignore_eos")
    return SamplingParams(**{name: getattr(sampling, name) for name in ends})


def agreement(llm: LLM, texts: Sequence[Completion]) -> float:
    """The share of tokens that full depth would have chosen too, given the same text before them."""
    agreed = 0
    for text in texts:
        choices = llm.model.full_depth_choices([*text.prompt, *text.tokens])[len(text.prompt) - 1 : -1]
        agreed += sum(token == choice for token, choice in zip(text.tokens, choices, strict=True))
    return agreed / sum(len(text.emissions) for text in texts)


def _rows(base: ExitParams, exits: Sequence[int], *, all_policies: bool) -> Iterator[tuple[str, ExitParams]]:
    yield _FULL, base.model_copy(update={"mode": "full"})
    for threshold in COMPARED_THRESHOLDS:
        changed = base.model_copy(update={"mode": "early_exit", "threshold": threshold, "thresholds": {}})
        for policy in get_args(KvPolicy) if all_policies else (base.kv_policy,):
            name = f"threshold {threshold}" + (f", {policy}" if all_policies else "")
            yield name, changed.model_copy(update={"kv_policy": policy})
    drafting = base.model_copy(update={"mode": "speculative"})
    if drafting.may_draft(exits):
        yield "speculative", drafting


def _summary(texts: Sequence[Completion], seconds: float) -> Summary:
    return Summary([emission for text in texts for emission in text.emissions], seconds)
