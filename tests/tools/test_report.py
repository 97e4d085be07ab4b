"""The report of a run: its figures are those of the run's files, and what a run lacks is no error."""

import json
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
from helpers.browsing import watching
from helpers.tools import ToolsHere
from matplotlib.figure import Figure

from megatron_ee.config import ExitParams, load_config
from megatron_ee.inference.exit_depths import write_depths
from megatron_ee.parallel.pipeline.timeline import Span
from megatron_ee.training.observation.trace import Trace, make_trace, write_trace
from megatron_ee.training.operations.attempts import Attempt, open_attempt

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import report
from report_words import duration, large, rounded, size, told
from show_schedule import show

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EVIL = "<script>alert(1)</script>"
PICTURES = 8  # losses, settings, speed, a plan, a trace, depths, a sweep's, goals
MakePage = Callable[..., "Seen"]


class Seen(HTMLParser):
    """A page's text, its facts, its tables' rows, and its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str | None] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.facts: dict[str, str] = {}
        self.whole = path.read_text(encoding="utf-8")
        self.feed(self.whole)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs)["alt"])
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        self.texts.append(data.strip())
        if self.tags[-1] == "dd":
            self.facts.setdefault(self.texts[-2], self.texts[-1])
        if self.tags[-1] in ("td", "th") and self.rows:
            self.rows[-1].append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def row(self, name: str) -> list[str]:
        """The first that begins so."""
        return next(row for row in self.rows if row and row[0] == name)


@pytest.fixture(scope="module")
def run(undisturbed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, with the files of other tools and the end that its process would have noted."""
    run = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(undisturbed_run, run, symlinks=True)
    Attempt(run / "attempts/1").end(0, "complete", iteration=60)
    _write(run / "pictures/thresholds.json", SWEEP)
    _write(run / "bench/train.json", BENCH)
    Figure(figsize=(1, 1)).savefig(run / "pictures/thresholds.png")
    write_trace(run / "traces/step_00000007.json", _trace(run))
    write_depths(run / "depths.json", {1: 30, 2: 10, 4: 60}, num_layers=4, exit=ExitParams(threshold=0.75))
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    report.make_page(run).save(run / "report.html")
    return run / "report.html"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakePage:
    """A page without pictures, which take the longest."""
    monkeypatch.setattr(report, "_pictures", lambda: None)

    def make(run: Path, **files: Any) -> Seen:
        report.make_page(run, **files).save(tmp_path / "report.html")
        return Seen(tmp_path / "report.html")

    return make


@pytest.fixture
def tool_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ToolsHere:
    return ToolsHere(monkeypatch, capsys)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _trace(run: Path) -> Trace:
    """A step of the run's plan, in which each action takes a millisecond."""
    plan = show(load_config(run / "config.yaml"), 2).plan
    recorded = [
        [Span(action, 1e-3 * place, 1e-3 * (place + 1)) for place, action in enumerate(actions)]
        for actions in plan.actions
    ]
    return make_trace(plan, recorded, iteration=7, world_size=2)


def _record(run: Path, *records: dict[str, float]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def _training(iteration: int) -> dict[str, float]:
    losses = {"train/exit_1/loss": 2.5, "train/exit_2/loss": 1.25, "train/exit_1/weight": 0.5}
    return {"iteration": iteration, **losses, "train/lr": 1e-3, "perf/tokens_per_s": 100.0, "perf/iter_time_s": 0.5}


def _start(run: Path, status: int | None, reason: str, iteration: int) -> Attempt:
    git = {"commit": f"c0ffee{iteration}", "has_changes": True}
    about = {"host": "node7", "git": git, "variables": {"WORLD_SIZE": "16"}}
    attempt = open_attempt(run, config="", environment=about)
    if status is not None:
        attempt.end(status, reason, iteration=iteration)
    return attempt


SWEEP = {
    "full": {"tokens_per_second": 271.0},
    "noise": 1.0,
    "cells": [
        {"exits": [1, 2], "threshold": 0.8, "speed": {"median": 1.7915, "low": 1.5, "high": 2.0}, "agreement": 0.975}
    ],
    "best": {"mode": "early_exit", "threshold": 0.8},
}
BENCH = [
    {
        "measure": name,
        "value": value,
        "goal": goal,
        "better": "lower",
        "spread": [0.9, 1.25],
        "aa": 1.0,
        "context": {},
    }
    for name, value, goal in (("step_over_plain", 1.015, 1.02), ("memory", 1.5, 1.03), ("noted", 3.0, None))
]
MEASURES = {
    "tokens": 1200,
    "curves": {"margin": {}},
    "at_mean_depth": {"depth": [2.0, 4.0], "margin": [0.5, 1.0]},
    "gates": {"2": {"target": "final", "error": 0.0625}},
}


def test_figures_are_those_of_the_record(run: Path, page: Path) -> None:
    seen = Seen(page)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [of for of in records if "train/loss" in of]
    validated = [of for of in records if "val/loss" in of]
    for layer, name in ((1, "exit 1"), (2, "exit 2"), (4, "final (4 layers)")):
        loss = f"{validated[-1][f'val/exit_{layer}/loss']:.4f}"
        assert f"{name}: {loss}" in seen.facts["Validation loss"]
        assert seen.row(name)[1] == loss
        assert seen.row(name)[4] == f"{trained[-1][f'train/exit_{layer}/loss']:.4f}"
    assert seen.facts["Speed"].startswith(f"{rounded(median(of['perf/tokens_per_s'] for of in trained))} tokens/s")
    assert seen.row("learning rate")[-1] == rounded(trained[-1]["train/lr"])
    assert seen.row("gradient norm")[-1] == rounded(trained[-1]["train/grad_norm"])
    assert f"{rounded(max(of['memory/peak_gib'] for of in trained))} GiB" in seen.facts["Memory"]
    assert seen.facts["Training"].startswith("60 of 60 iterations")
    assert "Complete, at iteration 60 of 60." in seen.text


def test_all_that_the_run_has_is_there(run: Path, page: Path) -> None:
    seen = Seen(page)
    about = json.loads((run / "checkpoints/step_00000050/format.json").read_text())
    assert about["hash"][:16] in seen.row("50")
    assert seen.row("forward")[2].endswith(" %") and float(seen.row("forward")[1]) > 0
    assert seen.row("0")[-1].startswith("layers ") and "Schedule 1f1b, 2 stages, 8 micro-batches" in seen.text
    assert seen.row("1, 2") == ["1, 2", "0.8", "1.792", "1.5", "2", "0.975"]
    assert "thresholds.json: the best setting is mode early_exit, threshold 0.8." in seen.texts
    assert [seen.row(name)[-1] for name in ("step_over_plain", "memory")] == ["yes", "NO"]
    assert "train.json: 1 of 2 goals are held." in seen.texts
    assert any(text.startswith("depths.json: 100 tokens, 2.90 of 4 layers a token; mode ") for text in seen.texts)
    assert len(seen.pictures) == PICTURES and all(seen.pictures)
    assert "Iteration 7 as it ran, beside its plan." in seen.texts
    assert (run / "config.yaml").read_text().strip() in seen.text


def test_the_same_files_give_the_same_page(run: Path, make: MakePage) -> None:
    assert make(run).whole == make(run).whole


@pytest.mark.parametrize("width", [1200, 360])
def test_it_is_whole_in_a_browser(page: Path, browser: "Browser", width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    with watching(tab) as watched:
        tab.goto(page.as_uri())
        widths = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
        reach = tab.evaluate("document.documentElement.scrollWidth")
    tab.close()
    assert len(widths) == PICTURES and min(widths) > 0
    assert reach == width, "nothing is wider than the window"
    assert not watched.complaints and watched.hosts == {""}, "nothing but the file itself was asked for"


def test_a_single_record_has_pictures_too(tmp_path: Path, tool_here: ToolsHere) -> None:
    run = _record(tmp_path / "a$b_^$", _training(1))
    done = tool_here("report.py", run, "--output", tmp_path / "new/page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'new/page.html'}\n"
    seen = Seen(tmp_path / "new/page.html")
    assert len(seen.pictures) == 3
    assert "final (2 layers): 1.2500 nats per token, at iteration 1" in seen.facts["Validation loss"]
    assert "The folder has no config.yaml." in seen.texts


def test_figures_that_are_no_numbers(tmp_path: Path) -> None:
    names = ("train/exit_1/loss", "train/grad_norm", "train/skipped", "perf/tokens_per_s", "perf/iter_time_s")
    odd = dict.fromkeys((*names, "time/forward_s", "pipeline/bubble_fraction", "memory/peak_gib"), float("nan"))
    infinite = dict.fromkeys(odd, float("inf"))
    run = _record(tmp_path / "run", _training(1), {**_training(2), **odd}, {**_training(3), **infinite})
    report.make_page(run).save(run / "report.html")
    seen = Seen(run / "report.html")
    assert len(seen.pictures) == 3 and "exit 1: inf" in seen.facts["Validation loss"]


def test_a_run_without_matplotlib_has_tables(
    tmp_path: Path, tool_here: ToolsHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _record(tmp_path / "run", _training(1), _training(2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("report_pictures", "plot_losses", "schedule_picture"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert tool_here("report.py", run).returncode == 0
    seen = Seen(run / "report.html")
    assert not seen.pictures
    assert "pip install 'megatron-ee[plots]'" in seen.text
    assert seen.row("exit 1") == ["exit 1", "2.5000", "0.5"]


def test_a_run_that_has_logged_nothing(tmp_path: Path, make: MakePage, run: Path) -> None:
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").touch()
    seen = make(tmp_path)
    assert seen.facts["Training"] == "nothing has been logged yet"
    assert not {"Validation loss", "Speed"} & {*seen.facts}


def test_a_run_that_still_goes(tmp_path: Path, make: MakePage) -> None:
    run = _record(tmp_path / "run", _training(4))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "train/')  # still being written
    _start(run, None, "", 0)
    assert "it is still going, or was killed. Its record goes to iteration 4" in make(run).text
    _write(
        run / "heartbeat.json",
        {"attempt": 1, "time": "2026-11-27T10:58:28+0000", "iteration": 5, "phase": "optimizer"},
    )
    seen = make(run)
    assert "Last sign of life: 2026-11-27 10:58:28 +0000, iteration 5, at optimizer" in seen.text
    assert "Nothing was validated" in seen.text


def test_a_resumed_run(tmp_path: Path, make: MakePage) -> None:
    run = _record(tmp_path / "run", _training(4), _training(8) | {"train/skipped": 2})
    (run / "metrics.jsonl.lost").write_text("{}\n{}\n")
    _start(run, 75, "SIGTERM", 4)
    failed = _start(run, None, "", 0)
    fault = {"fault": "died", "detail": "", "host": "node7", "rank": 3, "stage": 1, "iteration": 6, "action": "F1@1"}
    _write(failed.folder / "fault_0.json", fault)
    said = "rank 3 on node7, stage 1 died in iteration 6, at F1@1"
    assert f"Failed: {said}." in make(run).texts
    _start(run, 75, "exit_duration", 8)
    seen = make(run)
    assert "Stopped by exit_duration after iteration 8; started again, it goes on." in seen.texts
    trouble = seen.facts["Trouble"]
    assert "2 steps skipped" in trouble and f"start 2: {said}" in trouble
    assert "2 records of iterations that were done again" in trouble
    assert [row[-1] for row in seen.rows if row and row[0] in ("1", "2", "3")] == ["SIGTERM", said, "exit_duration"]
    assert seen.facts["Commit"] == "c0ffee8, with changes"
    assert seen.facts["Other commits"] == "start 1: c0ffee4, start 2: c0ffee0"
    assert seen.facts["Time"].endswith(" in 3 starts") and seen.facts["Time"].startswith("at least ")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", '{"iteration": 1}\n{"iteration": 2, "train/lr": "x"}\n', ":2: not a record of figures"),
        ("metrics.jsonl", '{"iteration": 1}\nnonsense\n', ":2: not a record of figures"),
        ("config.yaml", "name: [", "config.yaml:1"),
        ("heartbeat.json", "{", "cannot be read as JSON"),
        ("attempts/1/outcome.json", "[]", "not a JSON object"),
        ("checkpoints/step_00000004/format.json", "{", "cannot be read as JSON"),
        ("traces/step_00000001.json", "{}", "is no trace"),
        ("pictures/thresholds.json", '{"cells": [1], "best": {}}', "damaged, or of another release"),
        ("depths.json", '{"num_layers": 4, "tokens": {}, "exit": {}}', "damaged, or of another release"),
        ("bench/train.json", '[{"measure": "a", "value": "fast"}]', "damaged, or of another release"),
    ],
)
def test_a_broken_file_is_one_message(tmp_path: Path, tool_here: ToolsHere, file: str, content: str, said: str) -> None:
    run = _record(tmp_path / "run", {"iteration": 1})
    path = run / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    before = {*run.rglob("*")}
    done = tool_here("report.py", run)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and str(path) in done.stderr and said in done.stderr
    assert {*run.rglob("*")} == before


def test_what_is_no_run_is_refused(tmp_path: Path, tool_here: ToolsHere) -> None:
    done = tool_here("report.py", tmp_path)
    assert done.returncode == 2 and f"{tmp_path}: not a run's folder" in done.stderr
    done = tool_here("report.py", _record(tmp_path, _training(1)), "--bench", tmp_path / "none.json")
    assert done.returncode == 2 and done.stderr == f"{tmp_path / 'none.json'}: No such file or directory\n"
    _write(tmp_path / "other.json", {})
    done = tool_here("report.py", tmp_path, "--bench", tmp_path / "other.json")
    assert done.returncode == 2 and done.stderr == f"{tmp_path / 'other.json'}: not a file of bench\n"


def test_files_from_elsewhere(tmp_path: Path, make: MakePage) -> None:
    run = _record(tmp_path / "run", _training(1))
    _write(tmp_path / "train.json", BENCH)
    write_depths(tmp_path / "depths.json", {2: 1, 4: 1}, num_layers=4, exit=ExitParams())
    _write(run / "pictures/measures.json", MEASURES)
    _write(run / "pictures/odd.json", {"what": 1})
    seen = make(run, benches=[tmp_path / "train.json"], depths=[tmp_path / "depths.json"])
    assert seen.row("noted") == ["noted", "3", "0.9", "1.25", "1"]
    assert seen.row("2")[1:] in (["1", "50.0 %"], ["50.0 %"])
    assert seen.row("exit 2") == ["exit 2", "0.0625", "final"]
    assert "This report does not know what is in odd.json." in seen.texts


def test_a_picture_beside_figures_has_to_be_one(tmp_path: Path, make: MakePage) -> None:
    run = _record(tmp_path / "run", _training(1))
    _write(run / "pictures/thresholds.json", SWEEP)
    (run / "pictures/thresholds.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(report.UserError, match=r"thresholds\.png: not a whole PNG picture"):
        make(run)


def test_names_stay_text(tmp_path: Path, make: MakePage) -> None:
    run = _record(tmp_path / EVIL.replace("/", "_"), _training(1))
    attempt = open_attempt(
        run, config="", environment={"host": EVIL, "packages": {EVIL: "1"}, "variables": {EVIL: EVIL}}
    )
    attempt.end(75, EVIL, iteration=1)
    _write(run / "checkpoints/step_00000001/format.json", {"hash": "<i>abc</i>"})
    _write(run / "pictures/<b>.json", {**SWEEP, "best": {EVIL: EVIL}})
    seen = make(run)
    assert not {"script", "i", "b"} & {*seen.tags}
    assert f"Stopped by {EVIL} after iteration 1; started again, it goes on." in seen.texts
    assert "<i>abc</i>" in seen.row("1") or "<i>abc</i>" in seen.texts


def test_words() -> None:
    assert [duration(seconds) for seconds in (12.4, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 05 min"]
    assert [size(count) for count in (0, 512, 1536, 3 * 2**30)] == ["0 bytes", "512 bytes", "1.5 KiB", "3.0 GiB"]
    assert [large(count) for count in (61792, 2.1e6, 7e9)] == ["61,792", "2.1 million", "7 billion"]
    assert [rounded(value) for value in (None, True, 12345, 12345.6, 0.123456, float("nan"), "x")] == [
        *("-", "True", "12,345", "12,346", "0.1235", "nan", "x")
    ]
    assert [told(text) for text in ("soon", None)] == ["soon", "-"]
