"""Every recipe beside a plain run, 200 steps each on the built-in corpus: it runs, it is resumed in the middle bit for
bit, and the weights and probabilities in its record are the formula's."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train

from megatron_ee.config import Config

pytestmark = pytest.mark.slow

STEPS, HALF = 200, 100
LAYERS = 8
EXITS = {"layers": [2, 5], "weights": [0.25, 0.625], "weight_schedule": {"warmup_iters": 50}}
MEASURED = ("perf/", "time/", "pipeline/", "memory/")
Formula = Callable[[int], dict[str, float]]


def _warmed_up(iteration: int) -> dict[str, float]:
    share = min(1.0, iteration / 50)
    return {"exit_2/weight": 0.25 * share, "exit_5/weight": 0.625 * share, "exit_8/weight": 1.0}


def _cooled_down(iteration: int) -> dict[str, float]:
    """Exit 2 by a cosine from 1 to 0.25 in 150 iterations; exit 5 as it is."""
    share = (1 - math.cos(math.pi * min(1.0, iteration / 150))) / 2
    return {"exit_2/weight": 1.0 + share * (0.25 - 1.0), "exit_5/weight": 0.625, "exit_8/weight": 1.0}


def _layerskip(iteration: int) -> dict[str, float]:
    """Sections 4.1 and 4.2 of arXiv 2404.16710: e of layers 0 to 7, one of every 3 enabled, and the last."""
    depth = {0: 0.0, 1: 1, 2: 3, 3: 6, 4: 10, 5: 15, 6: 21}
    of = {layer: 0.2 * total for layer, total in depth.items()} | {7: 7 + 0.2 * 21}
    total = sum(e for layer, e in of.items() if layer == 7 or (layer - iteration) % 3 == 0)
    enabled = {layer: layer == 7 or (layer - iteration) % 3 == 0 for layer in of}
    weights = {f"exit_{layer + 1}/weight": e / total * enabled[layer] for layer, e in of.items()}
    grown = math.exp(iteration * math.log(2) / (STEPS - 1)) - 1
    skipped = {
        f"layer_{layer + 1}/dropout": 0.1 * grown * (math.exp(layer * math.log(2) / 7) - 1) for layer in range(LAYERS)
    }
    return weights | skipped


def _dropout_0_30(iteration: int) -> dict[str, float]:
    return _warmed_up(iteration) | {f"layer_{layer + 1}/dropout": 0.3 * layer / 7 for layer in range(LAYERS)}


def _tuned(_: int) -> dict[str, float]:
    return {"exit_3/weight": 1.0, "exit_6/weight": 1.0}


@dataclass(frozen=True)
class Recipe:
    """Fields of the config's sections, and what its record has to say at an iteration, which is counted from 0."""

    formula: Formula = _warmed_up
    exits: dict[str, Any] = field(default_factory=lambda: EXITS)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    begins_with_plain: bool = False


RECIPES = {
    "plain": Recipe(),
    "layerskip": Recipe(
        _layerskip,
        {
            "layers": "all",
            "norm": "shared",
            "layerskip": {"scale": 0.2, "curriculum": "rotational", "rotation": 3},
            "weight_schedule": {},
        },
        {"training": {"layer_dropout": {"maximum": 0.1, "shape": "exponential", "curriculum": "exponential"}}},
    ),
    "dropout-0-30": Recipe(
        _dropout_0_30, sections={"training": {"layer_dropout": {"maximum": 0.3, "shape": "linear"}}}
    ),
    "gates": Recipe(exits={**EXITS, "gate": ["linear", "mlp"], "gate_loss": {"target": "final"}}),
    "token-weights": Recipe(exits={**EXITS, "token_weights": "max_probability"}),
    "distillation": Recipe(exits={**EXITS, "distillation": {"weight": 0.5, "temperature": 2.0}}),
    "cool-down": Recipe(
        _cooled_down,
        {
            **EXITS,
            "temperature": [1.5, 1.0],
            "weight_schedule": [{"shape": "cosine", "start": 1.0, "warmup_iters": 150}, {"shape": "constant"}],
        },
    ),
    "tuning": Recipe(
        _tuned,
        {"layers": [3, 6], "head": "mlp", "weights": [1, 1], "weight_schedule": {"shape": "constant"}},
        {"training": {"trains": "exits"}},
        begins_with_plain=True,
    ),
    "fine-tuning": Recipe(sections={"data": {"format": "messages"}}, begins_with_plain=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With conversations about Python; the built-in corpus is written by the first run."""
    folder = tmp_path_factory.mktemp("recipes")
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": f"return {a + b}"},
            ]
        }
        for a in range(20)
        for b in range(20)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


def _config(folder: Path, name: str, run: str) -> Config:
    recipe = RECIPES[name]
    training = {"train_iters": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "eval_iters": 0}
    data: dict[str, Any] = {"dataset": "python-stdlib", "sequence_length": 64, "folder": str(folder / "data")}
    if recipe.sections.get("data", {}).get("format") == "messages":
        data |= {"dataset": str(folder / "talks.jsonl"), "format": "messages", "split": [100, 0, 0]}
    return run_config(
        folder,
        name=run,
        exits=recipe.exits,
        training=training | recipe.sections.get("training", {}),
        data=data,
        checkpoint={"initial": str(folder / "runs/plain")} if recipe.begins_with_plain else {},
        optimizer={"lr": 3e-3},
    )


def _stop_half_way(config: Config) -> None:
    train(config, until=HALF, save=True)


def _unmeasured(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not name.startswith(MEASURED)}


def _schedules(figures: dict[str, float]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if name.startswith("train/") and name.endswith(("/weight", "/dropout")):
            yield name.removeprefix("train/"), value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_is_resumed_and_does_what_its_formula_says(name: str, folder: Path, ranks: RankPool) -> None:
    (whole,) = ranks.run(1, train, _config(folder, name, name))
    for iteration in range(STEPS):
        said = dict(_schedules(whole["figures"][iteration + 1]))
        assert said == pytest.approx(RECIPES[name].formula(iteration), rel=1e-9, abs=1e-12), iteration

    ranks.run(1, _stop_half_way, _config(folder, name, f"{name}-in-two"))
    (resumed,) = ranks.run(1, train, _config(folder, name, f"{name}-in-two"))
    assert resumed["started_at"] == HALF
    for iteration in range(HALF + 1, STEPS + 1):
        assert _unmeasured(resumed["figures"][iteration]) == _unmeasured(whole["figures"][iteration]), iteration
    for parameter, values in whole["parameters"].items():
        np.testing.assert_array_equal(resumed["parameters"][parameter], values, err_msg=parameter)

    losses = {f: v for f, v in whole["figures"][STEPS].items() if f.endswith("/loss") and f.startswith("train/exit")}
    assert losses
    for figure, last in losses.items():
        first = next(of[figure] for _, of in sorted(whole["figures"].items()) if figure in of)
        print(f"{name:14} {figure:20} {first:.3f} -> {last:.3f}")
        assert last < first + 0.1
