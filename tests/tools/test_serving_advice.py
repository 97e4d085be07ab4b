"""Whether exits are recommended: on texts made by hand, where the answer is known, and on a tiny model."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset

from megatron_ee import LLM, ExitParams, SamplingParams
from megatron_ee.config import load_config
from megatron_ee.inference.scheduling.costs import SegmentCosts, write_costs
from megatron_ee.inference.scheduling.report_table import MILLISECONDS
from megatron_ee.parallel.mesh import Mesh

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import simulate_serving  # noqa: E402
from serving_advice import Advice, Gain, advise, fragment, verdict  # noqa: E402
from serving_costs import Machine  # noqa: E402
from serving_heard import Heard, Saying, cells_of  # noqa: E402
from serving_recommend import hear  # noqa: E402
from serving_runs import STRATEGIES, Setting  # noqa: E402

FLAT = ((1, 1.0), (2, 1.0))
SETTING = Setting("lockstep", 12, 3, 10**6, "recompute")


def machine(head: float) -> Machine:
    """Of two segments whose rows cost nothing."""
    costs = SegmentCosts({(0, 4): FLAT, (4, 8): FLAT}, {4: ((1, head), (2, head))})
    return Machine(costs, costs, (4,), 8, MILLISECONDS, "")


def texts(sure: float, right: float, seed: int = 0) -> list[Heard]:
    """Of 16 prompts; of its tokens the exit is sure of a share, and right in a share of those."""
    numbers = random.Random(seed)

    def token() -> dict[int, Saying]:
        is_sure = numbers.random() < sure
        return {4: Saying(1, 0.97 if is_sure else 0.1, numbers.random() < right)}

    return [Heard(3, [token() for _ in range(numbers.randint(10, 30))]) for _ in range(16)]


def advice_of(heard: Sequence[Heard], of: Machine, *, least: float = 0.95) -> tuple[Advice, str]:
    cells = cells_of(heard, ExitParams(), of, [])
    advice = advise(
        heard,
        cells,
        of,
        SETTING,
        strategies=STRATEGIES,
        times=lambda count: [0.0] * count,
        least_agreement=least,
        samples=12,
        seed=0,
    )
    return advice, verdict(advice, cells, least)


def test_exits_that_pay_are_recommended() -> None:
    """Three of four tokens leave halfway: 2 / (1 + 1/4) at most, and about that with four times as many residents."""
    advice, said = advice_of(texts(0.75, 1.0), machine(0.0))
    assert advice.best is not None and advice.best[0] == "rebatch" and advice.pays
    assert 1.2 < advice.over_full.low < advice.over_full.value < advice.over_full.high < 1.75  # type: ignore[union-attr]
    assert said.startswith("Best: rebatch at threshold ") and said.endswith("with 100.0% of full depth's tokens.")
    tree = fragment(advice, ExitParams())
    assert "strategy: rebatch" in tree and "launch_rows: 3" in tree and "max_batch_size: 12" in tree


def test_exits_that_cost_more_than_they_spare_are_not() -> None:
    advice, said = advice_of(texts(0.75, 1.0), machine(3.0))
    assert advice.best is not None and not advice.pays
    assert said.startswith("Do not switch it on: the best, ")
    assert fragment(advice, ExitParams()) == "inference:\n  exit:\n    mode: full\n"


def test_exits_that_are_never_sure_are_not() -> None:
    advice, said = advice_of(texts(0.0, 1.0), machine(0.01))
    assert not advice.pays and "Do not switch it on" in said
    assert advice.over_full is not None and advice.over_full.high <= 1


def test_exits_that_change_too_many_tokens_are_not() -> None:
    advice, said = advice_of(texts(0.75, 0.8), machine(0.0))
    assert (advice.best, advice.pays, advice.tried) == (None, False, {})
    assert said.startswith("Do not switch it on: no threshold keeps 95.0% of full depth's tokens. The closest is 0.")
    assert advice_of(texts(0.75, 0.8), machine(0.0), least=0.7)[0].pays


def test_a_gain_that_may_be_chance_is_none() -> None:
    shown = Advice(SETTING, {}, None, Gain(1.1, 0.99, 1.2), Gain(1.0, 1.0, 1.0))
    assert not shown.pays
    assert Advice(SETTING, {}, None, Gain(1.1, 1.01, 1.2), Gain(1.0, 1.0, 1.0)).pays


def test_tokens_leave_at_the_first_exit_that_is_sure_and_patient() -> None:
    costs = SegmentCosts(dict.fromkeys(((0, 2), (2, 4), (4, 8)), FLAT))
    two = Machine(costs, costs, (2, 4), 8, MILLISECONDS, "")
    heard = [
        Heard(
            1,
            [
                {2: Saying(7, 0.85, True), 4: Saying(7, 0.9, True)},
                {2: Saying(7, 0.2, False), 4: Saying(9, 0.75, False)},
                {2: Saying(7, float("nan"), False), 4: Saying(9, 0.1, False)},
            ],
        )
    ]
    depths = {of.threshold: of.depths[0] for of in cells_of(heard, ExitParams(), two, [])}
    assert (depths[0.7], depths[0.8], depths[0.9]) == ((2, 4, 8), (2, 8, 8), (4, 8, 8))
    assert [of.agreement for of in cells_of(heard, ExitParams(), two, [])[2:4]] == [2 / 3, 1.0]
    patient = {of.threshold: of.depths[0] for of in cells_of(heard, ExitParams(patience=2), two, [])}
    assert patient[0.7] == (4, 8, 8)


PROMPTS = ["early exits", "let a token", "when settled while", "deeper", "leave", "catch up"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    write_small_dataset(folder)
    config = run_config(
        folder,
        name="tiny",
        exits={"layers": [2, 5], "weight_schedule": {"warmup_iters": 1}},
        training={"train_iters": 30, "global_batch_size": 8},
        optimizer={"lr": 0.01},
    )
    ranks.run(1, train_and_save, config)
    return folder / "runs/tiny"


def test_what_exits_say_is_what_decoding_does(run: Path, mesh: Mesh) -> None:
    """Up to the first token that early exits change, texts are the same, and so are depths."""
    llm = LLM(run, overrides=["inference.sampling.max_new_tokens=12"], device="cpu")
    heard = hear(llm, PROMPTS)
    of = Machine(SegmentCosts({}), SegmentCosts({}), llm.model.exits, 8, MILLISECONDS, "")
    looked_at = 0
    for cell in cells_of(heard, ExitParams(), of, []):
        decoded = llm.generate(
            PROMPTS, SamplingParams(max_new_tokens=12), ExitParams(threshold=cell.threshold, mode="early_exit")
        )
        for text, said, depths in zip(decoded, heard, cell.depths, strict=True):
            right = [depth == 8 or said.tokens[at][depth].agrees for at, depth in enumerate(depths)]
            same = right.index(False) + 1 if False in right else len(right)
            assert text.exit_layers[:same] == list(depths[:same])
            looked_at += sum(depth < 8 for depth in depths[:same])
    assert looked_at > 20


@pytest.mark.parametrize("cheap", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_tool_recommends_what_pays(
    run: Path,
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cheap: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    head = ((1, 1e-6 if cheap else 0.1), (2, 2e-6 if cheap else 0.2))
    layers = dict.fromkeys(((0, 2), (2, 5), (5, 8)), ((1, 0.001), (2, 0.001)))
    write_costs(Path("costs.json"), SegmentCosts(layers, {2: head, 5: head}))
    options: list[Any] = ["--checkpoint", run, "--recommend", "prompts.txt", "--costs", "costs.json"]
    options += ["--agreement", "0", "--samples", "10", "--residents", "12", "--launch-rows", "3", "--output", "out"]
    monkeypatch.setattr(sys, "argv", [*map(str, ["", *options, "inference.sampling.max_new_tokens=12"])])
    assert simulate_serving.main() == 0
    printed = capsys.readouterr().out
    (content,) = json.loads(Path("out/recommendation.json").read_text())
    assert content["pays"] == cheap
    assert content["verdict"].startswith("Best: " if cheap else "Do not switch it on: the best, ")
    assert content["verdict"] in printed and content["fragment"] in printed
    Path("best.yaml").write_text(f"base: {run / 'config.yaml'}\n{content['fragment']}")
    best = load_config("best.yaml").inference
    assert (best.exit.mode, best.max_batch_size) == (("early_exit", 12) if cheap else ("full", 16))
    assert not cheap or best.scheduling.strategy == content["best"][0]


def test_costs_are_measured_where_there_is_no_file(run: Path, mesh: Mesh) -> None:
    from serving_costs import machine_of

    llm = LLM(run, device="cpu")
    measured = machine_of(llm, launch_rows=2)
    assert list(measured.costs.segments) == [(0, 2), (2, 5), (5, 8)]
    assert all(measured.costs.of_head(layer, 1) > 0 for layer in (2, 5, 8))
    assert 0 < measured.costs.of(0, 8, 1) < 1
    assert measured.costs.of(0, 8, 16) > 0


def test_too_few_prompts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\n")
    options = ["--checkpoint", "runs/none", "--recommend", "prompts.txt", "--output", "out"]
    monkeypatch.setattr(sys, "argv", ["", *options])
    assert simulate_serving.main() == 2
    assert capsys.readouterr().err == "prompts.txt: 2 prompts, and 4 are needed: half of them judge\n"
