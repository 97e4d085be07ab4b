"""A user's own parts, in one file outside the package and named in the YAML."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.decoding import decode, opened, request, tokens_of
from helpers.models import whole_model
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.config import ExitParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.measures import MEASURES, measure_of_logits
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.plugins import PluginError, choose, load_plugins

EXAMPLE = Path(__file__).parents[1] / "docs/examples/my_parts.py"


def test_a_run_with_a_schedule_optimizer_and_decay_of_ones_own(tmp_path: Path, ranks: RankPool) -> None:
    """Two stages equal one, so the schedule and the optimizer's norm over stages are right."""
    write_small_dataset(tmp_path)
    own: dict[str, Any] = {
        "plugins": [str(EXAMPLE)],
        "optimizer": {"backend": "sgd", "lr_decay": "inverse-sqrt", "lr": 0.1, "lr_warmup_iters": 2},
    }
    parallel = {"pipeline": 2, "schedule": "one-at-a-time"}
    two = ranks.run(2, train, run_config(tmp_path, name="two", parallel=parallel, **own))
    (one,) = ranks.run(1, train, run_config(tmp_path, name="one", **own))
    rates = [one["figures"][iteration]["train/lr"] for iteration in range(1, 7)]
    assert rates == pytest.approx([0.05, 0.1, *(0.1 * (2 / (2 + step)) ** 0.5 for step in range(4))])
    for iteration, figures in one["figures"].items():
        for name in ("train/loss", "train/grad_norm"):
            assert two[0]["figures"][iteration][name] == pytest.approx(figures[name], rel=1e-4)
    for result in two:
        for name, parameter in result["parameters"].items():
            np.testing.assert_allclose(parameter, one["parameters"][name], atol=1e-5, err_msg=name)


def test_a_measure_of_ones_own_decides_exits(mesh: Mesh) -> None:
    own = load_plugins([str(EXAMPLE)]).exit_measures
    measures = {**MEASURES, **{name: measure_of_logits(measure) for name, measure in own.items()}}
    model = opened(whole_model(mesh, exits=[2, 5]), measures=measures)
    names = ["gini", "max_probability"]
    requests = [request([1, 2], ExitParams(measure=name, threshold=0.0), max_new_tokens=4) for name in names]
    texts = decode(Batch(model, slots=2, capacity=8), requests)
    assert tokens_of(texts[0]) == tokens_of(texts[1])
    for gini, highest in zip(*texts, strict=True):
        assert highest.confidence**2 < gini.confidence < highest.confidence, "shares squared, summed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("x = 1", "defines none of EXIT_MEASURES"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "parts.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PluginError, match=message) as caught:
        load_plugins([str(path)])
    assert str(path) in str(caught.value)


def test_names_do_not_clash(tmp_path: Path) -> None:
    path = tmp_path / "parts.py"
    path.write_text("EXIT_MEASURES = {'max_probability': max, 'own': max}")
    with pytest.raises(PluginError, match="'max_probability' is built in"):
        choose("inference.exit.measure", "own", MEASURES, load_plugins([str(path)]).exit_measures)
    with pytest.raises(PluginError, match="'max_probability' is defined twice"):
        load_plugins([str(path), str(path)])
    with pytest.raises(PluginError, match="did you mean 'max_probability'"):
        choose("inference.exit.measure", "max_probabilty", MEASURES, {})


def test_a_schedule_that_gives_an_invalid_plan_is_refused(tmp_path: Path, ranks: RankPool) -> None:
    write_small_dataset(tmp_path)
    path = tmp_path / "parts.py"
    path.write_text("PIPELINE_SCHEDULES = {'none': lambda pipeline, stage: []}")
    config = run_config(tmp_path, plugins=[str(path)], parallel={"schedule": "none"})
    (answer,) = ranks.run(1, _build, config)
    assert answer.startswith("parallel.schedule: 'none' gives an invalid plan:")
    config = run_config(tmp_path, plugins=[str(path)], parallel={"schedule": "forward-only"})
    (answer,) = ranks.run(1, _build, config)
    assert answer.startswith("parallel.schedule: 'forward-only' must be one of"), "nothing would be trained"


def _build(config: Any) -> str:
    try:
        train(config)
    except PluginError as error:
        return str(error)
    return "trained"
