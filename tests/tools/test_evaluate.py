"""The tool that evaluates: its figures beside formulas in fp64 and real decoding, and its file, which grows."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.confidences import leaves_at, said_at_exits
from helpers.decoding import full_logits, opened
from helpers.models import whole_model
from helpers.runs import write_small_dataset
from helpers.saved import save_random_run
from helpers.tools import TOOLS, ToolsHere

from megatron_ee import LLM, ExitParams, SamplingParams
from megatron_ee.errors import FieldError, UserError
from megatron_ee.parallel.mesh import Mesh

sys.path.insert(0, str(TOOLS))

import evaluate_exits
import evaluate_texts
from evaluate_exits import TeacherForced, in_batches
from evaluate_modes import Mode, modes_of
from evaluate_results import Cell, Results, Setting, figures_of, markdown, tables
from evaluate_tasks import TaskModel, sampling_of
from evaluate_texts import Text, evaluate_text, rows_of
from evaluate_words import Words

EXITS = [2, 4, 6]
SETTING = Setting("runs/x", "hash", {"exits": [2]}, {"measure": "margin"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    """A run folder; the model is random."""
    folder = tmp_path_factory.mktemp("evaluate") / "tiny"
    save_random_run(folder, mesh, layers=[2, 5])
    return folder


def _thresholds(llm: LLM, measure: str = "max_probability") -> tuple[float, float]:
    """At which some tokens leave at every exit: a random model is never sure of anything."""
    mode = Mode("x", ExitParams(threshold=0.0, measure=measure))
    said = TeacherForced(llm.model, [mode]).said([list(b"early exits let a token leave")], [20])
    return tuple(float(np.quantile(np.concatenate(list(said.confidences.values())), q)) for q in (0.4, 0.7))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ToolsHere:
    return ToolsHere(monkeypatch, capsys)


def test_losses_of_every_exit_are_cross_entropies(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of batches and of rows that don't come out even, beside a pass without padding in fp64."""
    monkeypatch.setattr(evaluate_texts, "_BATCH", 2)
    stage = whole_model(mesh, exits=EXITS, head=["norm", "mlp", "block"])
    model = opened(stage)
    monkeypatch.setattr(evaluate_exits, "_NUMBERS", 7 * 4 * model.tokenizer.vocab_size)
    windows_BS = np.random.default_rng(0).integers(64, size=(3, 9))
    modes = modes_of(("full", "early_exit", "speculative"), (0.1, 0.0), ExitParams())
    assert rows_of(EXITS, modes) == ["exit 2", "exit 4", "exit 6", "full", "threshold 0", "threshold 0.1"]
    seen: list[int] = []
    cells = evaluate_text(model, Text("x", windows_BS), modes, rows_of(EXITS, modes), seen.append)
    assert (sum(seen), [cell.mode for cell in cells]) == (24, rows_of(EXITS, modes))
    of = {cell.mode: cell for cell in cells}
    final_N = torch.cat([full_logits(stage, window[:-1].tolist(), 8).argmax(-1) for window in windows_BS])
    for name, layer in {"exit 2": 2, "exit 4": 4, "exit 6": 6, "full": 8, "threshold 0": 2}.items():
        logits_NV = torch.cat([full_logits(stage, window[:-1].tolist(), layer) for window in windows_BS]).double()
        labels_N = torch.from_numpy(windows_BS[:, 1:]).flatten()
        figures = of[name].figures
        assert figures["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits_NV, labels_N)), rel=1e-6)
        assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
        assert figures["accuracy"] == float((logits_NV.argmax(-1) == labels_N).double().mean())
        assert figures["agreement"] == float((logits_NV.argmax(-1) == final_N).double().mean())
        assert (figures["tokens"], of[name].mean_depth, dict(of[name].depths)) == (24, layer, {layer: 24})


RULES = {
    "plain": ExitParams(),
    "from 4 on": ExitParams(min_exit=4),
    "patient": ExitParams(patience=2),
    "cosine": ExitParams(measure="cosine"),
    "margin of two": ExitParams(measure="margin", exits=(2, 6)),
}


@pytest.mark.parametrize("base", RULES.values(), ids=RULES)
def test_tokens_leave_where_the_rule_says(mesh: Mesh, base: ExitParams) -> None:
    """Of texts of unequal lengths, of which the ends are asked for, at a threshold amidst what exits say."""
    stage = whole_model(mesh, exits=EXITS)
    generator = np.random.default_rng(1)
    texts = [generator.integers(64, size=size).tolist() for size in (9, 5, 12)]
    asked_for = (
        [(0, position) for position in range(8)] + [(1, 2), (1, 3)] + [(2, position) for position in range(6, 11)]
    )
    at_exits = [said_at_exits(stage, text[:-1], EXITS) for text in texts]
    sure = sorted(at_exits[text][layer].confidence(base.measure, at) for text, at in asked_for for layer in EXITS)
    params = base.model_copy(update={"threshold": sum(sure[len(sure) // 2 :][:2]) / 2})
    mode = Mode("x", params)
    asked = TeacherForced(opened(stage), [mode])
    said = asked.said(texts, [8, 2, 5])
    outcome = asked.outcome(mode, said)
    layers = [leaves_at(at_exits[text], at, params, EXITS)[0] for text, at in asked_for]
    logits_NV = [at_exits[text][layer].logits_SV[at] for layer, (text, at) in zip(layers, asked_for, strict=True)]
    labels = [texts[text][at + 1] for text, at in asked_for]
    assert len(set(layers)) > 1, "the case says something"
    assert (outcome.depths_N.tolist(), said.labels_N.tolist()) == (layers, labels)
    assert outcome.answers.choices_N.tolist() == [int(logits_V.argmax()) for logits_V in logits_NV]
    log_p_NV = torch.tensor(np.array(logits_NV)).log_softmax(-1)
    np.testing.assert_allclose(outcome.answers.nats_N, -log_p_NV[range(15), labels], rtol=1e-5)


@pytest.mark.parametrize("base", [ExitParams(), ExitParams(measure="entropy", patience=2)], ids=["plain", "patient"])
def test_it_is_what_decoding_does(run: Path, mesh: Mesh, base: ExitParams) -> None:
    """Texts that are decoded with exits, and then given: the same tokens, from the same exits."""
    llm = LLM(run, device="cpu")
    depths = set()
    for mode in modes_of(("early_exit",), _thresholds(llm, base.measure), base):
        assert mode.exit.kv_policy == "recompute"
        texts = llm.generate(["early exits", "let a"], SamplingParams(max_new_tokens=20, ignore_eos=True), mode.exit)
        asked = TeacherForced(llm.model, [mode])
        said = asked.said([[*text.prompt, *text.tokens] for text in texts], [20, 20])
        outcome = asked.outcome(mode, said)
        assert outcome.depths_N.tolist() == [layer for text in texts for layer in text.exit_layers]
        assert outcome.answers.choices_N.tolist() == [token for text in texts for token in text.tokens]
        depths |= set(outcome.depths_N.tolist())
    assert len(depths) > 1


def test_corrections_are_those_of_decoding(run: Path, mesh: Mesh) -> None:
    llm = LLM(run, device="cpu")
    modes = modes_of(("sled", "dola"), (), ExitParams())
    for mode in modes:
        (text,) = llm.generate("early", SamplingParams(max_new_tokens=20, ignore_eos=True), mode.exit)
        asked = TeacherForced(llm.model, modes)
        outcome = asked.outcome(mode, asked.said([[*text.prompt, *text.tokens]], [20]))
        assert outcome.answers.choices_N.tolist() == text.tokens
        assert set(outcome.depths_N.tolist()) == {8}


def test_what_one_pass_cannot_say_is_refused(mesh: Mesh) -> None:
    model = opened(whole_model(mesh, exits=EXITS))
    propagating = modes_of(("early_exit",), (0.5,), ExitParams(kv_policy="propagate"))
    with pytest.raises(FieldError, match=r"inference\.exit\.kv_policy: with propagate"):
        TeacherForced(model, propagating)
    TeacherForced(model, modes_of(("full",), (), ExitParams(kv_policy="propagate")))
    with pytest.raises(FieldError, match="no gate after layers"):
        TeacherForced(model, modes_of(("early_exit",), (0.5,), ExitParams(measure="gate")))
    with pytest.raises(FieldError, match="sled, but no exit is there"):
        TeacherForced(opened(whole_model(mesh, exits=[])), modes_of(("sled",), (), ExitParams()))


def test_long_ones_run_together() -> None:
    assert list(in_batches([3, 9, 1, 9, 4], 2)) == [[1, 3], [4, 0], [2]]


def test_what_a_server_is_asked_for() -> None:
    base = ExitParams(measure="margin", thresholds={2: 0.3}, min_exit=2)
    full, half, drafts = modes_of(("speculative", "full", "early_exit"), (0.5,), base)
    assert full.asked == {"mode": "full"}
    expected = {"measure": "margin", "threshold": 0.5, "thresholds": {}, "min_exit": 2, "patience": 1}
    assert half.asked == {"mode": "early_exit", **expected, "kv_policy": "recompute"}
    drafting = {"draft_exit": "auto", "draft_length": "auto", "draft_threshold": 0.0, "min_exit": 2}
    assert drafts.asked == {"mode": "speculative", **drafting}


def _figures(folder: Path) -> dict[tuple[str, str], Any]:
    content = json.loads((folder / "evaluation.json").read_text())
    return {(cell["subject"], cell["mode"]): cell for cell in content["cells"]}


def test_a_run_that_is_stopped_goes_on(run: Path, tool: ToolsHere, tmp_path: Path, mesh: Mesh) -> None:
    """Interrupted when the first of two texts is done."""
    texts = []
    for name in ("one", "two"):
        path = tmp_path / name
        path.write_text(f"early exits let a token leave when {name} settled " * 5)
        texts += ["--text", path]
    command = ("evaluate.py", run, *texts, "--thresholds", "0.3,0.6", "--sequences", "4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = tool(*command, "--output", whole)
    assert done.returncode == 0, done.stderr
    expected = _figures(whole)
    rows = ["exit 2", "exit 5", "threshold 0.3", "threshold 0.6", "full"]
    assert sorted(expected) == sorted((name, row) for name in ("one", "two") for row in rows)
    assert done.stdout.count("threshold 0.6") == 2 and "text one" in done.stdout
    assert (whole / "evaluation.md").read_text().count("| threshold 0.6 |") == 2
    assert (whole / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stderr.splitlines()) == len(expected), "a line for each figure"

    evaluated: list[str] = []

    def stops_before(name: str | None) -> Any:
        def evaluate(model: Any, text: Text, *others: Any) -> list[Cell]:
            if text.name == name:
                raise KeyboardInterrupt
            evaluated.append(text.name)
            return evaluate_text(model, text, *others)

        return evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_texts, "evaluate_text", stops_before("two"))
        stopped = tool(*command, "--output", parts)
        assert stopped.returncode == 130
        assert f"stopped; {parts / 'evaluation.json'} has what is done, and the same command goes on" in stopped.stderr
        assert {subject for subject, _ in _figures(parts)} == {"one"}
        patch.setattr(evaluate_texts, "evaluate_text", stops_before(None))
        assert tool(*command, "--output", parts).returncode == 0
        assert evaluated == ["one", "two"]
        assert _figures(parts) == expected
        again = tool(*command, "--output", parts)
        assert (again.returncode, again.stderr, evaluated) == (0, "", ["one", "two"])

    other = tool(*command, "--output", parts, "inference.exit.measure=margin")
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 1)
    assert "figures that were measured otherwise (inference.exit)" in other.stderr
    longer = tool(*command[:-1], "3", "--output", parts)
    assert longer.returncode == 2 and "measured otherwise (one, two)" in longer.stderr
    assert _figures(parts) == expected
    anew = tool(*command[:-1], "3", "--output", parts, "--again")
    assert anew.returncode == 0 and _figures(parts)["one", "full"]["figures"]["tokens"] == 3 * 12


def test_the_validation_split_is_the_default(run: Path, tool: ToolsHere, tmp_path: Path, mesh: Mesh) -> None:
    data = (f"data.dataset={write_small_dataset(tmp_path)}", f"data.folder={tmp_path}", "data.split=[0.7,0.3,0.0]")
    modes = ("--thresholds", "0.5", "--modes", "early_exit,full,dola")
    done = tool("evaluate.py", run, "--sequences", "8", *modes, *data)
    assert done.returncode == 0, done.stderr
    figures = _figures(run / "pictures")
    assert {subject for subject, _ in figures} == {"validation"}
    assert "loss" not in figures["validation", "dola"]["figures"], "it rules tokens out"
    assert figures["validation", "full"]["figures"]["tokens"] == 8 * 12


WRONG = [
    (("--modes", "ful"), "--modes: 'ful' is none of full, early_exit, speculative, sled, dola; did you mean 'full'?"),
    (("--thresholds", "0.5,1.5"), "--thresholds: 1.5 is not in 0 to 1"),
    (("inference.exit.kv_policy=propagate",), "inference.exit.kv_policy: with propagate"),
    (("inference.exit.measur=margin",), "inference.exit.measur: unknown key"),
    (("--text", "nowhere"), "nowhere"),
    (("--tasks", "x"), "--tasks: needs lm-evaluation-harness: pip install 'megatron-ee[eval]'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_mistakes_are_named(
    run: Path, tool: ToolsHere, tmp_path: Path, mesh: Mesh, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        done = tool("evaluate.py", run, *arguments, "--output", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "evaluation.json").exists()


def test_tasks_are_scored_at_full_depth_and_by_exits(run: Path, mesh: Mesh) -> None:
    """Requests as the harness makes them, without it. Full depth says what `LLM.score` says."""
    llm = LLM(run, overrides=["inference.max_batch_size=3"], device="cpu")
    words = Words(llm.model.tokenizer, llm.model.begin)
    assert (words.prefix, words.end, words.encode("ab")) == (256, "<|endoftext|>", [97, 98])
    pairs = [
        (words.encode(context), words.encode(answer))
        for context, answer in (
            ("early", " exits"),
            ("let a", " token"),
            ("when", " settled"),
            ("a", "b"),
            ("e", "x" * 30),
        )
    ]
    full, half = modes_of(("full", "early_exit"), _thresholds(llm)[:1], ExitParams())
    model = TaskModel(llm, full)
    scores = model.score(pairs)
    for (context, answer), score in zip(pairs, scores, strict=True):
        (said,) = llm.score([[*context, *answer]], top=1)
        own = said[-len(answer) :]
        assert score.log_probability == pytest.approx(sum(of.token for of in own), rel=1e-5)
        likeliest = [next(iter(of.top)) for of in own]
        assert score.is_greedy == (likeliest == answer)
    assert dict(model.depths) == {8: sum(len(answer) for _, answer in pairs)}
    exiting = TaskModel(llm, half)
    assert [score.log_probability for score in exiting.score(pairs)] != [score.log_probability for score in scores]
    assert len(exiting.depths) > 1 and exiting.depths.total() == model.depths.total()

    model.max_length = 6  # of seven tokens the last one is not run
    (long,) = model.score([(words.encode("deeper layers"), words.encode("abc"))])
    (short,) = model.score([(words.encode("yers"), words.encode("abc"))])
    assert long == short
    for pair, message in ((([], [1]), "without a token"), (([1], []), "without a token"), (([1], [2] * 7), "7 tokens")):
        with pytest.raises(UserError, match=message):
            model.score([pair])


def test_tasks_are_decoded(run: Path, mesh: Mesh) -> None:
    llm = LLM(run, device="cpu")
    (half,) = modes_of(("early_exit",), _thresholds(llm)[:1], ExitParams())
    sampling = sampling_of({"until": ["zz", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 12})
    assert sampling == SamplingParams(max_new_tokens=12, stop=("zz",))
    prompts = [list(b"early exits"), list(b"let")]
    expected = llm.generate(prompts, sampling, half.exit)
    model = TaskModel(llm, half)
    assert model.generate(prompts, [sampling, sampling]) == [text.text for text in expected]
    assert sorted(model.depths.elements()) == sorted(layer for text in expected for layer in text.exit_layers)
    model.max_length = 15
    (cut,) = model.generate(prompts[:1], [sampling])
    assert cut == llm.generate([list(b"its")], sampling, half.exit)[0].text
    model.max_length = 12
    with pytest.raises(UserError, match="asks for 12 tokens, and the model has 12 positions"):
        model.generate(prompts, [sampling, sampling])
    for wrong, message in (({"num_beams": 4}, "num_beams is no setting"), ({"top_p": 7}, "generation_kwargs: 1 valid")):
        with pytest.raises(UserError, match=message):
            sampling_of({"until": [], "do_sample": True, "max_gen_toks": 1, **wrong})


def test_figures_of_the_harness() -> None:
    task = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A", "n": 3}
    assert figures_of({"x": task}, "x") == ({"acc": 0.5, "em (strict)": 1.0}, {"acc": 0.1})
    assert figures_of({"x": {"acc,none": 0.5}, "y": {"acc,none": 1.0}}, "tag") == ({"x acc": 0.5, "y acc": 1.0}, {})


def test_the_harness_has_one_door() -> None:
    texts = {path.name: path.read_text() for path in TOOLS.glob("*.py")}
    importing = re.compile(r"^\s*(import|from) lm_eval\b", re.MULTILINE)
    assert [name for name, text in texts.items() if importing.search(text)] == ["evaluate_harness.py"]


CELLS = [
    Cell("text", "a", "full", {"loss": 1.5, "accuracy": 0.25, "tokens": 8}, 8.0, {8: 8}),
    Cell("text", "a", "threshold 0.5", {"loss": 2.0, "accuracy": 0.125, "tokens": 8}, 3.5, {2: 6, 8: 2}),
    Cell("task", "b", "full", {"acc": 0.5}, None, errors={"acc": 0.01}, note="by full depth"),
]


def test_tables_by_hand() -> None:
    lines = tables(CELLS)
    assert lines[:4] == [
        "text a",
        "                 mean depth    loss  accuracy  tokens",
        "full                   8.00  1.5000     25.0%       8",
        "threshold 0.5          3.50  2.0000     12.5%       8",
    ]
    assert lines[-1] == "b, full: by full depth"
    page = markdown("x", CELLS)
    assert page.startswith("# x\n\n## text a\n\n|  | mean depth | loss | accuracy | tokens |\n| --- | --: |")
    assert "| full | - | 0.5000 ± 0.0100 |" in page


def test_the_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    results = Results(path, SETTING, {"a": "1"})
    results.keep(CELLS)
    opened_again = Results(path, SETTING, {"a": "1", "c": "2"})
    assert ("text", "a", "full") in opened_again and ("text", "c", "full") not in opened_again
    assert [(cell.subject, cell.mode) for cell in opened_again.ordered()] == [
        ("a", "threshold 0.5"),
        ("a", "full"),
        ("b", "full"),
    ]
    assert dict(opened_again.cells["text", "a", "threshold 0.5"].depths) == {2: 6, 8: 2}
    for setting, subjects, message in (
        (replace(SETTING, hash="other"), {}, r"measured otherwise \(checkpoint\)"),
        (replace(SETTING, model={"exits": [3]}), {}, r"measured otherwise \(exits or tokenizer\)"),
        (replace(SETTING, server="http://x"), {}, r"\(--server\)"),
        (SETTING, {"a": "2"}, r"measured otherwise \(a\)"),
    ):
        with pytest.raises(FieldError, match=message):
            Results(path, setting, subjects)
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "setting": {}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="--again begins anew"):
            Results(path, SETTING, {})
    assert not Results(path, SETTING, {}, again=True).cells
