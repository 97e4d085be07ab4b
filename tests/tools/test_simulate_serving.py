"""The tool that serves loads without a model: tables, files, replays, and what it says of wrong options."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import tiny_config

from megatron_ee.config import to_yaml
from megatron_ee.inference.decoding_record import read_record
from megatron_ee.inference.scheduling.costs import SegmentCosts, write_costs
from megatron_ee.inference.scheduling.simulate import SimulatedRequest
from megatron_ee.inference.scheduling.workload import read_load, write_load

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import simulate_serving  # noqa: E402
from serving_costs import machine_from_sizes  # noqa: E402

CURVE = ((1, 0.001), (33, 0.0015))
COSTS = SegmentCosts({(0, 4): CURVE, (4, 8): CURVE}, {4: ((1, 1e-4), (33, 2e-4)), 8: ((1, 1e-4), (33, 2e-4))})
SMALL = ("--requests", "24", "--prompts", "5", "--answers", "12", "--depths", "4:.7,8:.3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with costs and a config."""
    monkeypatch.chdir(tmp_path)
    write_costs(Path("costs.json"), COSTS)
    Path("tiny.yaml").write_text(to_yaml(tiny_config()))
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["simulate_serving.py", *map(str, arguments)])
    return simulate_serving.main()


def test_a_load_is_served_shown_and_replayed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--costs", "costs.json", "--residents", "8", "2", "--launch-rows", "4")
    drawn = ("--arrivals", "bursts", "--rate", "400", "--seed", "3", "--write-load", "load.jsonl")
    assert call(monkeypatch, *SMALL, *how, *drawn) == 0
    printed = capsys.readouterr().out
    load = read_load(Path("load.jsonl"))
    tokens = sum(len(of.depths) for of in load)
    assert (len(load), {depth for of in load for depth in of.depths}) == (24, {4, 8})
    assert printed.startswith(
        f"24 requests, {tokens} tokens; costs: costs.json\n\n8 residents, 4 rows a launch, recomp"
    )
    assert printed.count("forced exits") == printed.count("layers 5 to 8: launches") == 2
    assert "rebatching gains" in printed.split("2 residents, 4 rows")[1]
    assert "rebatching gains" not in printed.split("2 residents, 4 rows")[0], "there are more residents than rows"
    content = json.loads(Path("runs/serving/serving.json").read_text())
    of = content["residents"]["8"]["rebatch"]
    assert (of["requests"], of["tokens"], of["forced"]) == (24, tokens, 0)
    assert f"{of['tokens_per_second']:,.4g}" in printed
    assert all(slots["real"] + slots["filled"] + slots["empty"] == pytest.approx(1) for slots in of["slots"])
    picture = Path("runs/serving/serving.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert call(monkeypatch, *how, "--load", "load.jsonl", "--output", "again") == 0
    assert json.loads(Path("again/serving.json").read_text()) == content
    assert Path("again/serving.png").read_bytes() == picture
    assert call(monkeypatch, *how, "--load", "load.jsonl", "--output", "again", "--kv-policy", "propagate") == 0
    assert json.loads(Path("again/serving.json").read_text())["residents"] != content["residents"]


def test_costs_follow_the_sizes_of_a_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--depths", "2:.5,5:.2,8:.3", "--requests", "8", "--answers", "6")
    assert call(monkeypatch, "tiny.yaml", "model.vocab_size=320", *more) == 0
    assert "costs: estimated from sizes" in capsys.readouterr().out
    machine = machine_from_sizes(tiny_config(model={"vocab_size": 320}))
    assert (machine.exits, machine.num_layers) == ((2, 5), 8)
    assert machine.costs.of(0, 8, 1) + machine.costs.of_head(8, 1) == pytest.approx(1), "a pass"
    assert machine.costs.of(0, 2, 1) * 4 == pytest.approx(machine.costs.of(0, 8, 1))
    heads = [machine_from_sizes(tiny_config(model={"vocab_size": size})).costs.of_head(2, 1) for size in (320, 640)]
    assert heads[1] > heads[0] > 0
    assert machine.weighed.of(0, 2, 3) / machine.weighed.of(0, 8, 1) == pytest.approx(0.25 * 1.16)


def test_a_load_without_requests_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("load.jsonl").write_text("")
    assert call(monkeypatch, "--costs", "costs.json", "--load", "load.jsonl") == 2
    assert capsys.readouterr().err == "load.jsonl: holds no request\n"


def test_a_token_leaves_where_its_request_looks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_load(Path("load.jsonl"), [SimulatedRequest(3, (4, 8)), SimulatedRequest(3, (4, 8), exits=())])
    assert call(monkeypatch, "--costs", "costs.json", "--load", "load.jsonl") == 2
    assert capsys.readouterr().err == "load.jsonl:2: no token leaves after layer 4, only after [8]\n"


def test_stages_are_cut_as_the_options_the_load_or_the_config_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    depths = ("--depths", "2:.7,5:.2,8:.1", "--requests", "20", "--prompts", "3", "--answers", "8")
    how = ("tiny.yaml", "model.vocab_size=320", "--strategies", "compaction", *depths)
    cut = {}
    for options in (
        ("--stages", "2"),
        ("--stages", "2", "--layout", "survival"),
        ("--stage-layers", "1,2,5"),
        ("inference.parallel.pipeline=2",),
        ("inference.parallel.pipeline=3", "inference.parallel.layout=[3, 3, 2]"),
    ):
        assert call(monkeypatch, *how, *options) == 0
        content = json.loads(Path("runs/serving/serving.json").read_text())
        stops = cut[options] = content["stages"]
        assert "stages: layers 1 to " in capsys.readouterr().out
        of = content["residents"]["16"]["compaction"]
        assert len(of["stages"]) == len(stops)
        assert all(sum(stage.values()) == pytest.approx(1) for stage in of["stages"])
        assert {layers["layers"][1] for layers in of["slots"]} <= {2, 5, 8, *stops}
    equal, survival, listed, of_config, of_list = cut.values()
    assert equal == of_config and listed == [1, 3, 8] and of_list == [3, 6, 8]
    assert survival[0] < equal[0], "most tokens leave early"
    assert Path("runs/serving/serving.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_of_a_pipeline_is_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--costs", "costs.json", "--strategies", "rebatch", "--record", "record.json", "--kv-policy", "fill")
    assert call(monkeypatch, *SMALL, *how, "--stage-layers", "3,5") == 0
    record = read_record(Path("record.json"))
    assert record.stops == (3, 8) and record.has("seconds")
    of = json.loads(Path("runs/serving/serving.json").read_text())["residents"]["16"]["rebatch"]
    assert sum(slots["launches"] for slots in of["slots"]) == len(record.launches)
    assert call(monkeypatch, *SMALL, *how) == 2
    assert "--record: notes the stages of a pipeline, and there is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--costs", "costs.json", "--stage-layers", "3,4"], "--stage-layers: add up to 7, and the model has 8 layers"),
        (
            ["tiny.yaml", "model.vocab_size=320", "--depths", "2:1", "--stages", "9"],
            "--stages: 9 stages need at least 9",
        ),
        (["--costs", "none.json"], "none.json: cannot be read as JSON"),
        (["--costs", "tiny.yaml"], "tiny.yaml: cannot be read as JSON"),
        (["--costs", "costs.json", "--depths", "3:1"], "--depths: no token leaves after layer 3, only after [4, 8]"),
        (["--costs", "costs.json", "tiny.yaml"], "costs.json: segments: end after layers [4, 8], and the model's"),
        (["--costs", "costs.json", "--output", "tiny.yaml"], "--output: tiny.yaml cannot be written to"),
        (["tiny.yaml", "model.layers=3"], "model.layers"),
        (["--checkpoint", "runs/none", "--output", "out"], "runs/none"),
    ],
)
def test_what_a_user_got_wrong_is_one_message(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    depths = [] if "--depths" in arguments else ["--depths", "4:1"]
    assert call(monkeypatch, *depths, *arguments) == 2
    printed, errors = capsys.readouterr()
    assert (printed, len(errors.splitlines())) == ("", 1)
    assert said in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--depths", "4:1"], "say what launches cost: --costs FILE, or a CONFIG or --checkpoint"),
        (["--costs", "c"], "say how deep tokens go: --depths, or --load"),
        (["--costs", "c", "--load", "f", "--seed", "1"], "--seed draws a load, and --load reads one"),
        (["--costs", "c", "--depths", "4:1", "--arrivals", "poisson"], "--arrivals poisson needs a --rate"),
        (["--costs", "c", "--depths", "4"], "'4' is no LAYER:SHARE"),
        (["--costs", "c", "--depths", "4:.1,4:.2"], "its layer comes twice"),
        (["--costs", "c", "--depths", "4:0"], "no token leaves anywhere"),
        (["--costs", "c", "--depths", "4:1", "--residents", "0"], "0 is below 1"),
        (["--costs", "c", "--depths", "4:1", "--agreement", ".9"], "--agreement goes with --recommend"),
        (["--costs", "c", "--depths", "4:1", "--stages", "2"], "stages are cut by a model's sizes"),
        (["--costs", "c", "--depths", "4:1", "--stage-layers", "2,x"], "'2,x' is no list of numbers of layers"),
        (["c", "--depths", "4:1", "--stages", "3", "--stage-layers", "4,4"], "has 2 stages, and --stages says 3"),
        (["c", "--depths", "4:1", "--layout", "equal"], "--layout cuts a pipeline: --stages says into how many"),
        (["--checkpoint", "r", "--recommend", "p", "--stages", "2"], "--stages does not go with --recommend"),
        (["c", "--depths", "4:1", "--record", "r"], "--record is of one run"),
        (["--costs", "c", "--recommend", "p"], "--recommend needs the model: --checkpoint"),
        (["--checkpoint", "r", "--recommend", "p", "--depths", "4:1"], "--depths does not go with --recommend"),
        (["--checkpoint", "r", "--recommend", "p", "--kv-policy", "propagate"], "propagate changes tokens"),
    ],
)
def test_options_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[Any], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *arguments)
    assert said in capsys.readouterr().err
