"""Whether exits pay for a model and prompts of one's own, where many requests are served."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving_advice import Advice, advise, fragment, lines_of, verdict
from serving_costs import Machine, machine_from_file, machine_of
from serving_heard import Cell, Heard, Saying, cells_of
from serving_load import arrival_times
from serving_runs import Setting

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.config import ExitParams
from megatron_ee.errors import UserError
from megatron_ee.inference.__main__ import split_settings
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.comparison import greedy
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.llm import LLM, open_model
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.prompts import read_prompts

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.inference.completion import Completion

FEWEST = 4
"""Prompts: two choose, two judge."""
AGREEMENT = 0.95
SAMPLES = 50


def recommend(arguments: argparse.Namespace, output: Path) -> None:
    """Print what was tried and what to do for each number of residents, and write recommendation.json.

    Raises:
        UserError: the prompts, the model or the costs are wrong.
    """
    prompts = read_prompts(arguments.recommend)
    if len(prompts) < FEWEST:
        raise UserError(f"{arguments.recommend}: {len(prompts)} prompts, and {FEWEST} are needed: half of them judge")
    config_file, overrides = split_settings(arguments.settings)
    folder = find_model(arguments.checkpoint)
    with open_decoding_config(folder, overrides, config_file=config_file) as config:
        llm = LLM.of(open_model(folder, config), config)
        if not llm.model.exits:
            raise UserError(f"{folder}: the model has no early exit")
        most = max(arguments.launch_rows or of for of in arguments.residents)
        machine = machine_from_file(arguments.costs, config) if arguments.costs else machine_of(llm, launch_rows=most)
        texts = hear(llm, prompts)
    tokens = sum(len(text.tokens) for text in texts)
    print(f"{len(texts)} prompts, {tokens} tokens at full depth; {machine.said}")
    params = llm.config.inference.exit
    cells = cells_of(texts, params, machine, sorted(llm.model.gated))
    least = AGREEMENT if arguments.agreement is None else arguments.agreement
    content = []
    for advice in _advices(texts, cells, machine, arguments, least):
        print("", *lines_of(advice, cells, least), "", fragment(advice, params), sep="\n", end="")
        content.append(_as_json(advice, cells, least, params))
    path = output / "recommendation.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")


def hear(llm: LLM, prompts: Sequence[Prompt]) -> list[Heard]:
    """Decode prompts greedily at full depth, and ask every exit that may fire about every token.

    Raises:
        UserError: a prompt or a setting does not fit the model.
    """
    rule = ExitRule(
        llm.config.inference.exit.model_copy(update={"mode": "early_exit", "threshold": 0.5, "thresholds": {}}),
        llm.model.exits,
        llm.model.gated,
    )
    texts = llm.generate(list(prompts), greedy(llm.config.inference.sampling), ExitParams(mode="full"))
    return [_hear(llm, text, rule) for text in texts]


def _hear(llm: LLM, text: "Completion", rule: ExitRule) -> Heard:
    """By one pass over the text."""
    import torch
    from exit_observations import ask_all

    model, measure = llm.model, llm.model.measure_named(rule.measure)
    first = len(text.prompt) - 1
    confidences: dict[int, list[float]] = {}
    choices: dict[int, list[int]] = {}
    with torch.inference_mode():
        device = next(model.stage.parameters()).device
        tokens_BS = torch.tensor([[*text.prompt, *text.tokens][:-1]], device=device)
        for layer, parts in ask_all(model, tokens_BS):
            asked = list(parts)
            choices[layer] = [choice for part in asked for choice in part.logits.argmax(-1).tolist()][first:]
            if layer in rule.thresholds:
                confidences[layer] = [value for part in asked for value in measure(part).tolist()][first:]
    truth = choices[max(choices)]
    tokens = [
        {
            layer: Saying(choices[layer][at], of[at], choices[layer][at] == truth[at])
            for layer, of in confidences.items()
        }
        for at in range(len(text.tokens))
    ]
    return Heard(len(text.prompt), tokens)


def _advices(
    texts: Sequence[Heard], cells: Sequence[Cell], machine: Machine, arguments: argparse.Namespace, least: float
) -> Iterator[Advice]:
    setting = Setting("lockstep", 1, arguments.launch_rows, arguments.max_wait, arguments.kv_policy)
    for residents in arguments.residents:
        yield advise(
            texts,
            cells,
            machine,
            replace(setting, residents=residents),
            strategies=arguments.strategies,
            times=lambda count: arrival_times(arguments, count),
            least_agreement=least,
            samples=arguments.samples or SAMPLES,
            seed=arguments.seed,
        )


def _as_json(advice: Advice, cells: Sequence[Cell], least: float, params: ExitParams) -> dict[str, Any]:
    return {
        "residents": advice.setting.residents,
        "launch_rows": advice.setting.rows,
        "least_agreement": least,
        "thresholds": [
            {"threshold": of.threshold, "agreement": of.agreement, "mean_depth": of.mean_depth} for of in cells
        ],
        "over_full_where_chosen": {str(threshold): gains for threshold, gains in advice.tried.items()},
        "best": None if advice.best is None else [advice.best[0], advice.best[1].threshold],
        "over_full": advice.over_full,
        "over_lockstep": advice.over_lockstep,
        "pays": advice.pays,
        "verdict": verdict(advice, cells, least),
        "fragment": fragment(advice, params),
    }
