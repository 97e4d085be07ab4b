"""The tool that finds the best settings: its figures beside what a tiny model says itself, and its files."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.decoding import full_logits
from helpers.models import whole_model

from megatron_ee import LLM, ExitParams, SamplingParams
from megatron_ee.config import SledParams, load_config
from megatron_ee.inference.corrections.sled import sled
from megatron_ee.parallel.mesh import Mesh

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import sweep  # noqa: E402
import sweep_corrections  # noqa: E402
import sweep_speculation  # noqa: E402
import sweep_thresholds  # noqa: E402
from sweep_results import Files, Panel, Swept, write  # noqa: E402
from sweep_timing import time_settings  # noqa: E402

PROMPTS = ["early exits", "let a token", "when settled while", "deeper"]
SAMPLING = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def llm(run: Path, mesh: Mesh) -> LLM:
    return LLM(run, overrides=["inference.sampling.max_new_tokens=12", "inference.max_batch_size=3"], device="cpu")


def test_drafts_are_those_that_the_model_ran(llm: LLM) -> None:
    """Counted from tokens, and counted by what ran: every draft was verified in a turn of full depth."""
    swept = sweep_speculation.sweep(llm, PROMPTS, exits=[2, 5], lengths=[1, 4], rounds=1)
    cells = {(cell["draft_exit"], cell["draft_length"]): cell for cell in swept.content["cells"]}
    assert list(cells) == [(2, 1), (2, 4), (5, 1), (5, 4), ("auto", "auto")]
    full = llm.generate(PROMPTS, SAMPLING, ExitParams(mode="full"))
    for (layer, length), cell in cells.items():
        before = llm.work
        texts = llm.generate(PROMPTS, SAMPLING, ExitParams(mode="speculative", draft_exit=layer, draft_length=length))
        work = llm.work - before
        assert [text.tokens for text in texts] == [text.tokens for text in full]
        assert (cell["same_tokens"], cell["same_texts"]) == (1.0, 1.0)
        assert cell["drafted"] == work.drafted
        assert cell["cycles"] == work.turns - len(PROMPTS)
        assert cell["tokens_per_cycle"] == sum(len(text.tokens) - 1 for text in texts) / cell["cycles"]
    assert 0 < cells[5, 4]["accepted"] < cells[5, 4]["drafted"]


def test_agreement_is_what_one_pass_over_each_text_says(llm: LLM) -> None:
    swept = sweep_thresholds.sweep(llm, PROMPTS, exits=None, thresholds=[0.0, 0.3], least_agreement=0.0, rounds=1)
    stage = llm.model.stage
    cells = swept.content["cells"]
    assert [(cell["exits"], cell["threshold"]) for cell in cells] == [
        (exits, threshold) for exits in ((2,), (5,), (2, 5)) for threshold in (0.0, 0.3)
    ]
    for cell in cells:
        exit_params = ExitParams(exits=cell["exits"], threshold=cell["threshold"])
        texts = llm.generate(PROMPTS, SAMPLING, exit_params)
        agreed, depths = [], []
        for text in texts:
            logits_SV = full_logits(stage, [*text.prompt, *text.tokens], 8)[:, : llm.model.tokenizer.vocab_size]
            choices = logits_SV.argmax(-1).tolist()[len(text.prompt) - 1 : -1]
            agreed += [token == choice for token, choice in zip(text.tokens, choices, strict=True)]
            depths += text.exit_layers
        assert cell["agreement"] == np.mean(agreed)
        assert cell["mean_depth"] == pytest.approx(np.mean(depths))
    assert cells[0]["agreement"] < 1 and cells[0]["mean_depth"] == 2


def test_corrections_are_tallied_as_a_loop_over_tokens_does(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of batches and of rows that don't come out even."""
    from helpers.decoding import opened

    stage = whole_model(mesh, exits=[2, 4, 6], head=["norm", "mlp", "block"])
    model = opened(stage)
    monkeypatch.setattr(sweep_corrections, "_BATCH", 2)
    monkeypatch.setattr(sweep_corrections, "_NUMBERS", 7 * 4 * model.tokenizer.vocab_size)
    windows_BS = np.random.default_rng(0).integers(64, size=(3, 9))
    settings = {(alpha, top_k): SledParams(alpha=alpha, top_k=top_k) for alpha, top_k in ((0.5, 3), (9.0, 2))}
    full, cells = sweep_corrections.measure(model, windows_BS, [2, 6], settings)
    said = [{layer: full_logits(stage, window[:-1].tolist(), layer) for layer in (2, 6, 8)} for window in windows_BS]
    labels = torch.from_numpy(windows_BS[:, 1:]).flatten()
    final_NV = torch.cat([of[8] for of in said])
    was_right = final_NV.argmax(-1) == labels
    assert (full.tokens, full.accuracy) == (24, float(was_right.float().mean()))
    assert full.loss == pytest.approx(float(torch.nn.functional.cross_entropy(final_NV, labels)), rel=1e-5)
    for cell, params in zip(cells, settings.values(), strict=True):
        right, losses = [], []
        for of, window in zip(said, windows_BS, strict=True):
            for at, label in enumerate(window[1:]):
                z_1V, early = of[8][at : at + 1], [of[layer][at : at + 1] for layer in (2, 6)]
                corrected_V = sled(z_1V, early, params)[0]
                right.append(int(corrected_V.argmax()) == label)
                tail_V = z_1V[0] < z_1V[0].topk(params.top_k).values[-1]
                losses.append(-float(torch.where(tail_V, z_1V[0], corrected_V).log_softmax(-1)[label]))
        changes = np.array(right, dtype=int) - was_right.numpy()
        assert (cell.accuracy, cell.difference) == (np.mean(right), pytest.approx(np.mean(changes)))
        assert cell.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert cell.standard_error == pytest.approx(np.std(changes, ddof=1) / 24**0.5)
    assert cells[1].gained + cells[1].lost > 0, "the second setting changes something"


def test_corrections_without_the_heads_norms(mesh: Mesh) -> None:
    from helpers.decoding import opened

    stage = whole_model(mesh, exits=[4])
    windows_BS = np.random.default_rng(0).integers(64, size=(4, 9))
    losses = {}
    for norm in (True, False):
        settings = {(2.0, 5): SledParams(norm=norm, top_k=5)}
        _, (cell,) = sweep_corrections.measure(opened(stage), windows_BS, [4], settings)
        losses[norm] = cell.loss
    assert abs(losses[True] - losses[False]) > 1e-6


def test_settings_take_turns_with_full_depth(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each token moves on, by how it is decoded: only ratios within a round count."""
    seconds = {"full": 2.0, "early_exit": 1.0, "speculative": 4.0}
    now, asked, decode = [0.0], [], llm.generate

    def generate(prompts: Sequence[Any], sampling: SamplingParams, params: ExitParams) -> Any:
        texts = decode(prompts, sampling, params)
        asked.append(params.mode)
        now[0] += seconds[params.mode] * sum(len(text.tokens) for text in texts)
        return texts

    monkeypatch.setattr(llm, "generate", generate)
    monkeypatch.setattr("sweep_timing._clock_of", lambda llm: lambda: now[0])
    settings = {name: ExitParams(mode=mode) for name, mode in enumerate(["early_exit", "speculative"] * 2)}
    timings = time_settings(llm, PROMPTS[:1], settings, rounds=2)
    assert {name: speed.median for name, speed in timings.speeds.items()} == {0: 2.0, 1: 0.5, 2: 2.0, 3: 0.5}
    assert (timings.full_speed, timings.noise, timings.same.median) == (0.5, 1.0, 1.0)
    group = ["full", "early_exit", "speculative", "early_exit", "full"]
    assert asked == group * 3 + ["full", "speculative", "full"] * 3


BEST = [
    ExitParams(mode="full"),
    ExitParams(mode="speculative", draft_exit=5, draft_length=3),
    ExitParams(mode="early_exit", exits=(5,), threshold=0.3, measure="margin", kv_policy="propagate"),
    ExitParams(mode="sled", sled=SledParams(alpha=0.5, top_k=3, norm=False)),
]


@pytest.mark.parametrize("best", BEST, ids=lambda best: best.mode)
def test_the_fragment_is_a_config_that_decodes_as_the_setting_does(
    llm: LLM, run: Path, tmp_path: Path, best: ExitParams
) -> None:
    """Over a config whose own exits it has nothing to do with."""
    other = ExitParams(threshold=0.1, thresholds={2: 0.0}, patience=2, min_exit=5, draft_length=7)
    config = llm.config.model_copy(update={"inference": llm.config.inference.model_copy(update={"exit": other})})
    files = Files.of(tmp_path, "speculation", "png")
    write(files, config, Swept([], best, {"cells": []}))
    loaded = load_config(files.fragment)
    assert loaded == config.model_copy(update={"inference": config.inference.model_copy(update={"exit": best})})
    assert json.loads(files.json.read_text())["best"]["mode"] == best.mode
    (text,) = LLM(run, config=files.fragment).generate("early exits")
    (expected,) = llm.generate("early exits", exit=best)
    assert (text.tokens, text.exit_layers) == (expected.tokens, expected.exit_layers)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
    return sweep.main()


SMALL = {
    "speculation": ["--prompt", "early", "--lengths", "2", "--rounds", "1", "--exits", "5"],
    "thresholds": ["--prompt", "early", "--thresholds", "0.5,0.1", "--rounds", "1", "--agreement", "0.5"],
    "sled": ["--sequences", "3", "--alphas", "1,0.5", "--top-k", "5"],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_whole_sweep(
    run: Path,
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    output = tmp_path / "new/folder"
    options = ["--checkpoint", run, "--output", output, "inference.sampling.max_new_tokens=4", "device=cpu"]
    assert _main(monkeypatch, name, *options, *SMALL[name], "--picture", "svg") == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    assert {path.name for path in output.iterdir()} == {
        f"{name}{end}" for end in (".json", ".yaml", "_base.yaml", ".svg")
    }
    content = json.loads((output / f"{name}.json").read_text())
    assert len(content["cells"]) == {"speculation": 2, "thresholds": 6, "sled": 2}[name]
    assert f"    mode: {content['best']['mode']}\n" in said
    assert f"{output}/{name}.yaml --checkpoint {run}" in said
    best = load_config(output / f"{name}.yaml").inference
    assert (best.exit.mode, best.sampling.max_new_tokens) == (content["best"]["mode"], 4)
    assert (output / f"{name}.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speculation", "--exits", "3"], "--exits: there is no exit after layer 3, only after [2, 5]"),
        (["speculation", "--lengths", "2,0"], "--lengths: 0 is not in 1 to 256 (inference.exit.max_pending)"),
        (["thresholds", "--thresholds", "0.5,1"], "--thresholds: 1 is not at least 0 and below 1, where no exit fires"),
        (["thresholds", "inference.exit.measure=gate"], "gate, but exits.gate is none for the exits after"),
        (["thresholds", "inference.exit.patience=3"], "inference.exit.patience: 3 exits in a row, but 2 may fire"),
        (["thresholds", "inference.exit.min_exit=6"], "inference.exit: leaves none of the exits after [2, 5]"),
        (["thresholds", "--prompts", "nowhere"], "nowhere: No such file or directory"),
        (["sled", "--alphas", "0"], "--alphas: 0 is not a number above 0, which is full depth"),
        (["sled", "--top-k", "0"], "--top-k: 0 is below 1"),
        (["sled", "--text", "latin"], "latin: not UTF-8 at byte 0"),
        (["sled", "inference.exit.sled.layers=[3]"], "inference.exit.sled.layers"),
        (["speculation", "--output", "latin/below"], "--output: latin/below cannot be written to"),
        (["speculation", "inference.exit.draft_length=x"], "inference.exit.draft_length"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_a_user_got_wrong_is_one_message(
    run: Path,
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes(b"\xff")
    prompts = [] if arguments[0] == "sled" else ["--prompt", "early"]
    where = [] if "--output" in arguments else ["--output", "out"]
    assert _main(monkeypatch, *arguments, "--checkpoint", run, *prompts, *where) == 2
    printed, errors = capsys.readouterr()
    assert (printed, len(errors.splitlines())) == ("", 1)
    assert said in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speculation", "--alphas", "1"], "--alphas goes with sled, not with speculation"),
        (["sled", "--exits", "2"], "--exits goes with speculation and thresholds, not with sled"),
        (["sled", "--top-k", "2,x"], "argument --top-k: invalid list of numbers value: '2,x'"),
        (["thresholds"], "give prompts, by --prompt or --prompts"),
        (["thresholds", "--agreement", "95"], "95 is not in 0 to 1"),
        (["speculation", "--rounds", "0"], "0 is below 1"),
    ],
)
def test_options_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _main(monkeypatch, *arguments, "--checkpoint", "runs/none")
    assert said in capsys.readouterr().err


def test_an_interrupt_leaves_nothing_behind(
    run: Path, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(3))

    def generate(llm: LLM, *_: object) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return decode(llm, *_)

    decode = LLM.generate
    monkeypatch.setattr(LLM, "generate", generate)
    options = ["--checkpoint", run, "--output", tmp_path / "out", *SMALL["speculation"]]
    assert _main(monkeypatch, "speculation", *options) == 130
    assert capsys.readouterr() == ("", "stopped; nothing was written\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_picture_is_the_same_twice(tmp_path: Path) -> None:
    from sweep_picture import save_picture

    from megatron_ee.errors import UserError

    labels = (["2", "5"], ["1", "2", "3"], "exit", "length")
    values = [[1.2, 0.8, None], [1.0, 0.7, 0.9]]
    panels = [
        Panel("speed", values, *labels, "{:.2f}x", neutral=1.0, line=1.0, best=(0, 0)),
        Panel("loss", [[2.0] * 3] * 2, *labels, "{:.0%}", lower_is_better=True),
    ]
    for end, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        pictures = []
        for number, shown in enumerate((panels, panels, panels[:1])):
            save_picture(tmp_path / f"{number}{end}", shown, title="speculation")
            pictures.append((tmp_path / f"{number}{end}").read_bytes())
        assert pictures[0] == pictures[1] != pictures[2]
        assert pictures[0].startswith(start)
    with pytest.raises(UserError, match=r"must end in one of \.png, \.svg"):
        save_picture(tmp_path / "a.gif", panels, title="")
