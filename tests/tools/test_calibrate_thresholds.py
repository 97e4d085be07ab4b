"""The tool that finds thresholds which keep a promise: its parts by hand, and a whole run that is then deployed."""

import io
import json
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tools import ToolsHere
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee import LLM, ExitParams, SamplingParams
from megatron_ee.errors import UserError
from megatron_ee.inference.comparison import agreement
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.server.settings import open_serving_config

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import calibrate_thresholds  # noqa: E402
import calibration_path  # noqa: E402
import calibration_risks as risks  # noqa: E402
from calibration_prompts import Asked, split, windows_of  # noqa: E402
from calibration_results import Terms, choose  # noqa: E402
from calibration_runs import Measured, Trial  # noqa: E402
from serving_heard import Heard, Saying  # noqa: E402

PROMPTS = ["early exits", "let a token", "when settled while", "deeper layers read"]
SAID = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60)


@pytest.fixture(scope="module")
def llm(run: Path, mesh: Mesh) -> LLM:
    return LLM(run, overrides=["inference.sampling.max_new_tokens=12"], device="cpu")


def test_the_most_eager_threshold_by_hand() -> None:
    said = [(0.9, True)] * 6 + [(0.8, False)] + [(0.7, True)] * 3 + [(0.6, False)] * 5
    assert calibration_path.most_eager(said, 0.15) == 0.9, "one that is not there counts as wrong: 1 of 7"
    assert calibration_path.most_eager(said, 0.2) == 0.7, "2 of 11, though 2 of 8 were too many"
    assert calibration_path.most_eager(said, 0.1) == 1.0
    assert calibration_path.most_eager([], 0.5) == 1.0


@given(said=SAID, error=st.floats(0.01, 0.99))
def test_of_those_that_leave_no_more_are_wrong_than_may_be(said: list[tuple[float, bool]], error: float) -> None:
    threshold = calibration_path.most_eager(said, error)
    wrong = [not agrees for confidence, agrees in said if confidence >= threshold + 1e-4]
    assert sum(wrong) <= error * (len(said) + 1)


@given(texts=st.lists(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.floats(0, 1)), max_size=8), max_size=8))
def test_candidates_are_ever_more_eager(texts: list[list[tuple[float, bool, float]]]) -> None:
    heard = [
        Heard(4, [{2: Saying(1, first, agrees), 5: Saying(1, second, True)} for first, agrees, second in text])
        for text in texts
    ]
    for way in ("exits", "common"):
        found = calibration_path.candidates(heard, ExitParams(kv_policy="propagate"), [2, 5], way)  # type: ignore[arg-type]
        assert found[0].params.mode == "full" and len({candidate.name for candidate in found}) == len(found)
        for before, after in pairwise(found[1:]):
            assert before.params.kv_policy == "propagate" and after.params.mode == "early_exit"
            assert all(after.params.thresholds[layer] <= before.params.thresholds[layer] for layer in (2, 5))
            assert after.params.thresholds != before.params.thresholds


@given(a=st.lists(st.integers(0, 3), max_size=7), b=st.lists(st.integers(0, 3), max_size=7))
def test_the_longest_common_subsequence_is_the_longest(a: list[int], b: list[int]) -> None:
    def is_within(part: list[int], whole: list[int]) -> bool:
        rest = iter(whole)
        return all(item in rest for item in part)

    parts = [[item for at, item in enumerate(a) if mask >> at & 1] for mask in range(1 << len(a))]
    assert risks.longest_common_subsequence(a, b) == max(len(part) for part in parts if is_within(part, b))


def test_losses_against_references_by_hand() -> None:
    assert (risks.mismatch(" 42\n", "42"), risks.mismatch("42.", "42")) == (0.0, 1.0)
    assert risks.words_lost("the cat sat", "The cat sat") == 0.0
    assert risks.words_lost("the cat", "a dog") == 1.0
    assert risks.words_lost("the cat sat down", "the cat") == pytest.approx(1 - 2 * 2 / 6)
    assert risks.words_lost("", "") == 0.0


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=12),
        SamplingParams(max_new_tokens=12, temperature=0.9, top_k=20),
        SamplingParams(max_new_tokens=12, temperature=0.9, seed=5, repetition_penalty=1.2, min_new_tokens=6),
    ],
    ids=["greedy", "sampled", "penalties"],
)
def test_full_depth_never_disagrees_with_itself(llm: LLM, sampling: SamplingParams) -> None:
    """Its random numbers and its history are those of the text, token by token."""
    full, eager = ExitParams(mode="full"), ExitParams(threshold=0.0)
    for params, never in ((full, True), (eager, False)):
        requests = llm.requests(PROMPTS, sampling, params)
        texts = llm.generate(PROMPTS, sampling, params)
        losses = [risks.disagreement(llm.model, *pair) for pair in zip(requests, texts, strict=True)]
        assert (sum(losses) == 0) == never
        assert max(losses) <= 1


def test_greedy_disagreement_is_what_comparisons_say(llm: LLM) -> None:
    params = ExitParams(threshold=0.0)
    texts = llm.generate(PROMPTS, None, params)
    losses = [risks.disagreement(llm.model, *p) for p in zip(llm.requests(PROMPTS), texts, strict=True)]
    assert np.mean(losses) == pytest.approx(1 - agreement(llm, texts))
    assert 0 < np.mean(losses) < 1


def test_each_risk_is_measured_on_the_very_texts(llm: LLM) -> None:
    full, eager = (
        calibration_path.Candidate(name, params)
        for name, params in (("full", ExitParams(mode="full")), ("eager", ExitParams(threshold=0.0)))
    )
    references = [text.text for text in llm.generate(PROMPTS, None, full.params)]
    asked = Asked(PROMPTS, references)
    for risk in risks.RISKS:
        trial = Trial(llm, asked, risk)
        assert trial.measure(full).risk == 0.0, risk
        measured = trial.measure(eager)
        assert 0 < measured.risk <= 1 and measured.mean_depth == 2.0, risk
        assert measured.worst_decile == max(measured.losses_N)
        assert measured.tokens == 12 * len(PROMPTS)


def _measured(risk: float, count: int) -> Measured:
    candidate = calibration_path.Candidate(f"{risk}", ExitParams(threshold=1 - risk))
    return Measured(candidate, np.full(count, risk), {8: count}, 1.0)


def test_full_depth_needs_no_proof_where_it_is_the_truth() -> None:
    """Five prompts prove nothing at 1 %. Against references full depth has losses as everybody has."""
    measured = [_measured(0.0, 5), _measured(0.001, 5)]
    promise = choose(measured, 0.01, Terms("disagreement", "hoeffding_bentkus", 0.1))
    assert promise.chosen is measured[0] and promise.next is measured[1]
    promise = choose(measured, 0.01, Terms("words", "hoeffding_bentkus", 0.1))
    assert promise.chosen is None and promise.next is measured[0]
    assert promise.params == ExitParams(mode="full")


def test_the_last_that_is_shown_is_chosen() -> None:
    measured = [_measured(risk, 800) for risk in (0.0, 0.01, 0.02, 0.2, 0.01)]
    promise = choose(measured, 0.05, Terms("disagreement", "hoeffding_bentkus", 0.1))
    assert promise.chosen is measured[2] and promise.next is measured[3]


def test_no_prompt_has_two_parts() -> None:
    parts = split(windows_of(np.arange(1000), 4), seed=3, count=200)
    numbers = [prompt[0] for part in parts for prompt in part.prompts]
    assert len(set(numbers)) == len(numbers) == 200
    assert [len(part.prompts) for part in parts] == [40, 120, 40]
    assert numbers != sorted(numbers), "they are shuffled"
    with pytest.raises(UserError, match="19 prompts, and 20 are needed"):
        split(windows_of(np.arange(76), 4), seed=3, count=200)
    with pytest.raises(UserError, match="3 tokens of text make no prompt of 4"):
        windows_of(np.arange(3), 4)


@pytest.fixture(scope="module")
def calibrated(run: Path, mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with two promises, and what was printed. At 60 % nearly everything may be otherwise."""
    output = tmp_path_factory.mktemp("thresholds")
    said = io.StringIO()
    arguments = [str(run), "--target", "0.01,0.6", "--count", "120", "--prompt-tokens", "8", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", ["x", *arguments, "inference.sampling.max_new_tokens=8", "device=cpu"])
        assert calibrate_thresholds.main() == 0
    return output, said.getvalue()


def test_files_say_what_was_found(calibrated: tuple[Path, str]) -> None:
    output, said = calibrated
    names = {"thresholds_0.01.json", "thresholds_0.6.json", "calibration.json", "calibration.html"}
    assert {path.name for path in output.iterdir()} == names
    figures = json.loads((output / "calibration.json").read_text())
    assert figures["prompts"] == {"choosing": 24, "calibration": 72, "fresh": 24}
    strict, loose = figures["promises"]
    assert strict["calibration"]["mode"] == "full", "72 prompts cannot prove 1 %"
    assert loose["calibration"]["mode"] == "early_exit" and loose["p_value"] <= 0.1
    assert loose["calibration"]["mean_depth"] < 8 and loose["calibration"]["risk"] < 0.6
    assert 0 <= loose["fresh"]["risk_interval"][0] <= loose["fresh"]["risk"] <= loose["fresh"]["risk_interval"][1]
    assert "0.01: full depth alone" in said and str(output / "thresholds_0.6.json") in said
    page = (output / "calibration.html").read_text()
    assert page.count("<img ") == 3 and "What the promise rests on" in page and loose["calibration"]["name"] in page


def test_it_is_deployed_for_its_checkpoint_alone(
    calibrated: tuple[Path, str], run: Path, mesh: Mesh, tmp_path: Path
) -> None:
    file = calibrated[0] / "thresholds_0.6.json"
    named = f"inference.thresholds_file={file}"
    content: dict[str, Any] = json.loads(file.read_text())
    thresholds = {int(layer): of for layer, of in content["thresholds"].items()}
    deployed = LLM(run, overrides=[named], device="cpu")
    assert deployed.config.inference.exit.thresholds == thresholds
    alike = ExitParams(thresholds=thresholds, threshold=1.0, exits=(2, 5))
    assert deployed.generate(PROMPTS) == deployed.generate(PROMPTS, None, alike)
    with open_serving_config(None, [named], model=run) as (_, config):
        assert config.inference.exit == deployed.config.inference.exit
    other = tmp_path / "thresholds.json"
    other.write_text(json.dumps({**content, "checkpoint_hash": "0" * 64}))
    for opened in (
        lambda: LLM(run, overrides=[f"inference.thresholds_file={other}"], device="cpu"),
        lambda: open_serving_config(None, [f"inference.thresholds_file={other}"], model=run).__enter__(),
    ):
        with pytest.raises(UserError, match=r"thresholds_file: .* was made for another checkpoint, 000000000000"):
            opened()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inference.exit.kv_policy=propagate", "kv_policy: 'propagate', but .* holds for 'recompute' alone"),
        (
            "inference.exit.thresholds.2=0.1",
            "thresholds: {2: 0.1, 5: .*}, but .* holds for {2: .* alone",
        ),
        ("inference.exit.mode=full", "inference.exit.mode: 'full', but .* 'early_exit' alone"),
        ("inference.sampling.temperature=0.7", "inference.sampling.temperature: 0.7, but .* holds for 0.0 alone"),
    ],
)
def test_what_voids_a_promise_is_refused(
    calibrated: tuple[Path, str], run: Path, override: str, message: str, mesh: Mesh
) -> None:
    named = f"inference.thresholds_file={calibrated[0] / 'thresholds_0.6.json'}"
    with pytest.raises(UserError, match=f"override '{override.split('=')[0]}.*{message}"):
        LLM(run, overrides=[named, override], device="cpu")
    with pytest.raises(UserError, match=message), open_serving_config(None, [named, override], model=run):
        pass


def test_what_a_request_may_say_stays_free(calibrated: tuple[Path, str], run: Path, mesh: Mesh) -> None:
    named = f"inference.thresholds_file={calibrated[0] / 'thresholds_0.6.json'}"
    free = ["inference.sampling.max_new_tokens=3", "inference.sampling.seed=1", "inference.exit.max_pending=7"]
    deployed = LLM(run, overrides=[named, *free], device="cpu")
    assert len(deployed.generate("early")[0].tokens) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "10"], "10 prompts, and 20 are needed"),
        (["inference.thresholds_file=x.json"], "inference.thresholds_file: x.json cannot be read"),
        (["inference.exit.exits=[3]"], "inference.exit.exits"),
        (["inference.exit.min_exit=8"], "no exit may fire"),
        (["--text", "none.txt"], "none.txt"),
    ],
)
def test_mistakes_are_one_message(
    run: Path, mesh: Mesh, tools_here: ToolsHere, tmp_path: Path, arguments: list[str], message: str
) -> None:
    ran = tools_here("calibrate_thresholds.py", run, "--output", tmp_path / "out", "device=cpu", *arguments)
    assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_references_are_wanted_where_they_are_measured_against(
    run: Path, mesh: Mesh, tools_here: ToolsHere, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"early exits {number}", "reference": "the"} for number in range(30)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("calibrate_thresholds.py", run, "--output", tmp_path / "out", "device=cpu")
    options = ("--risk", "words", "--prompts", prompts, "inference.sampling.max_new_tokens=4")
    ran = tools_here(*common, *options)
    assert ran.returncode == 0 and "nothing can be promised: full depth itself loses" in ran.stdout, ran.stderr
    prompts.write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in lines))
    ran = tools_here(*common, *options)
    assert ran.returncode == 2 and "prompts.jsonl:1: no text `reference`" in ran.stderr
