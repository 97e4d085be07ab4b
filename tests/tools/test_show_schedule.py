"""Plans and recorded steps as text and pictures; pictures, and what is not installed, in processes of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny import tiny_config
from helpers.tools import ToolsHere

from megatron_ee.config import load_config, to_yaml
from megatron_ee.parallel.costs import ModelCosts, write_costs
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.pipeline.plan import WORK
from megatron_ee.parallel.pipeline.timeline import Span
from megatron_ee.training.observation.trace import make_trace, write_trace
from megatron_ee.training.planning import plan_step

Show = Callable[..., subprocess.CompletedProcess[str]]
TOOL = Path(__file__).parents[2] / "tools/show_schedule.py"
VOCAB_SIZE = 320
SIZES = ("model.vocab_size=320", "parallel.pipeline=2")
FILLED = ("model.vocab_size=320", "model.ffn_hidden_size=2048", "parallel.pipeline=4", "parallel.schedule=filled-1f1b")
ZERO_BUBBLE = (*SIZES, "parallel.schedule=zero-bubble")
INTERLEAVED = (*SIZES, "parallel.schedule=interleaved", "parallel.chunks=2")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny_config()))
    return path


@pytest.fixture
def show_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """As `_show`, in this very process."""
    tool = ToolsHere(monkeypatch, capsys)
    return lambda *arguments: tool(TOOL.name, "run.yaml", *arguments)


def _show(*arguments: str, tool: tuple[str, ...] = (str(TOOL),)) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *tool, "run.yaml", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _record(path: Path, *overrides: str) -> None:
    """A step in which every F, X and B takes 4 ms, and each action begins 1 ms after the one before has ended."""
    config = load_config("run.yaml", overrides)
    plan = plan_step(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, 8)
    recorded, start = [], 0.0
    for actions in plan.actions:
        spans, now = [], start
        for action in actions:
            end = now + (0.004 if action.kind in WORK else 0)
            spans.append(Span(action, now, end))
            now = end + 0.001
        recorded.append(spans)
        start += 0.01
    write_trace(path, make_trace(plan, recorded, iteration=3, world_size=config.parallel.pipeline))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (SIZES, "schedule 1f1b, 2 stages, 8 micro-batches; costs estimated"),
        (FILLED, "schedule filled-1f1b, 4 stages, 8 micro-batches, fills: 1 warm-up and 1 cool-down; costs estimated"),
        (ZERO_BUBBLE, "schedule zero-bubble, 2 stages, 8 micro-batches; costs estimated"),
        (INTERLEAVED, "schedule interleaved, 2 stages of 2 chunks, 8 micro-batches; costs estimated"),
        (
            (*SIZES, "parallel.schedule=megatron", "--world-size", "4"),
            "schedule megatron-core's own, shown as our 1f1b, 2 stages, 4 micro-batches; costs estimated",
        ),
    ],
    ids=["1f1b", "filled", "zero-bubble", "interleaved", "megatron"],
)
@pytest.mark.usefixtures("run")
def test_a_plan_is_shown_as_text(show_here: Show, overrides: tuple[str, ...], said: str) -> None:
    done = show_here(*overrides, "--width", "90")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    num_stages = 4 if "parallel.pipeline=4" in overrides else 2
    assert lines[0] == said
    placement, drawing, table = lines[1 : num_stages + 1], lines[num_stages + 2 :], lines[-num_stages - 3 :]
    assert [line.partition(":")[0] for line in placement] == [f"stage {stage}" for stage in range(num_stages)]
    assert [len(line) for line in drawing[1 : num_stages + 1]] == [90] * num_stages
    assert table[0].split() == ["stage", "busy", "idle", "(layer", "forwards)", "most", "live", "micro-batches"]
    assert [line.split()[0] for line in table[1 : num_stages + 1]] == [str(stage) for stage in range(num_stages)]
    assert lines[-1].startswith("makespan ")
    assert "layer forwards, bubble " in lines[-1]


@pytest.mark.usefixtures("run")
def test_idle_time_and_live_micro_batches_are_those_of_1f1b(show_here: Show) -> None:
    """Without exits and with a weightless head the closed form holds: 2 stages idle for one F + B each."""
    overrides = (*SIZES, "exits.layers=[]", "exits.weights=[]")
    config = load_config("run.yaml", overrides)
    costs = ModelCosts(0.001, 0.002, 0.0, 0.0, {"norm": 0.0}, 0.0)
    write_costs(Path("costs.json"), costs, config, VOCAB_SIZE, device="CPU")
    done = show_here(*overrides, "parallel.costs=costs.json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("costs measured, costs.json")
    assert [line.split() for line in lines[-4:-2]] == [["0", "88.9%", "12.00", "2"], ["1", "88.9%", "12.00", "1"]]
    assert lines[-1] == "makespan 108.00 ms, bubble 11.1%"


@pytest.mark.parametrize(
    ("overrides", "name", "begin"),
    [
        pytest.param(SIZES, "a.png", b"\x89PNG", marks=pytest.mark.slow),
        (FILLED, "a.svg", b"<?xml"),
        pytest.param(INTERLEAVED, "a.png", b"\x89PNG", marks=pytest.mark.slow),
        pytest.param(ZERO_BUBBLE, "a.svg", b"<?xml", marks=pytest.mark.slow),
    ],
    ids=["1f1b, png", "filled, svg", "interleaved, png", "zero-bubble, svg"],
)
def test_the_same_plan_is_the_same_picture(run: Path, overrides: tuple[str, ...], name: str, begin: bytes) -> None:
    pictures = []
    for folder in ("one", "two"):
        done = _show(*overrides, "--output", f"{folder}/{name}")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f"\n{folder}/{name}\n")
        pictures.append(Path(folder, name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(begin)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(SIZES, marks=pytest.mark.slow),
        FILLED,
        pytest.param(INTERLEAVED, marks=pytest.mark.slow),
        ZERO_BUBBLE,
    ],
    ids=["1f1b", "filled", "interleaved", "zero-bubble"],
)
def test_a_recorded_step_is_shown_beside_its_plan(run: Path, show_here: Show, overrides: tuple[str, ...]) -> None:
    _record(run.parent / "trace.json", *overrides)
    done = show_here(*overrides, "--trace", "trace.json", "--output", "beside.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert "iteration 3 as recorded, in ms" in done.stdout
    recorded, plan, ratio = (line.split() for line in done.stdout.splitlines()[-5:-2])
    assert (recorded[0], plan[0], ratio[:3]) == ("recorded", "plan,", ["recorded", "/", "plan"])
    assert float(recorded[1]) / float(plan[3]) == pytest.approx(float(ratio[3]), abs=2e-3)
    assert float(ratio[3]) > 1
    assert b"<svg" in Path("beside.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "a.pdf"], "--output: a.pdf must end in one of .png, .svg"),
        (["--output", "run.yaml/a.png"], "[Errno 17] File exists: 'run.yaml'"),
        (["--trace", "none.json"], "none.json: No such file or directory"),
        (["--trace", "run.yaml"], "run.yaml: is no trace of a training step, or is damaged (JSONDecodeError: "),
        (
            ["--trace", "trace.json", "training.global_batch_size=6"],
            "trace.json: micro-batches: 8, but the config's plan has 6; give the run's config.yaml",
        ),
        (
            ["--trace", "trace.json", "exits.layers=[6]", "exits.weights=[1.0]"],
            "trace.json: exits: 8/8, but the config's plan has 0/8; give the run's config.yaml",
        ),
        (["--world-size", "3"], "override 'parallel.pipeline=2': parallel.pipeline: 3 processes don't divide into 2"),
        (["parallel.costs=none.json"], "override 'parallel.costs=none.json': parallel.costs: none.json does not exist"),
        (
            ["plugins=[mine.py]", "parallel.schedule=mine"],
            "override 'parallel.schedule=mine': parallel.schedule: this tool knows 1f1b, gpipe, interleaved, "
            "filled-1f1b, zero-bubble, megatron, not the plug-in's 'mine'",
        ),
    ],
    ids=["ending", "below a file", "no trace", "foreign", "batch", "exits", "processes", "costs", "plug-in"],
)
def test_what_cannot_be_shown_is_one_message(run: Path, show_here: Show, arguments: list[str], said: str) -> None:
    _record(run.parent / "trace.json", *SIZES)
    done = show_here(*SIZES, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


def test_a_config_that_is_not_there_is_one_message(run: Path) -> None:
    run.unlink()
    done = _show()
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "run.yaml: No such file or directory\n")


def test_without_matplotlib_text_works_and_a_picture_says_what_to_install(run: Path) -> None:
    start = f"import sys, runpy; sys.path.insert(0, {str(TOOL.parent)!r}); sys.modules['matplotlib'] = None; "
    tool = "-c", start + f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    assert _show(*SIZES, tool=tool).returncode == 0
    done = _show(*SIZES, "--output", "a.png", tool=tool)
    message = "--output: pictures need matplotlib: pip install 'megatron-ee[plots]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_showing_a_plan_imports_no_torch(run: Path) -> None:
    start = f"import sys, runpy; sys.path.insert(0, {str(TOOL.parent)!r}); "
    start += "sys.modules['torch'] = sys.modules['megatron'] = None; "
    done = _show(*SIZES, tool=("-c", start + f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"))
    assert (done.returncode, done.stderr) == (0, "")
