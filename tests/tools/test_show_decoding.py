"""Lanes of a decoding pipeline, drawn from what an engine recorded, and from records whose lanes are known."""

from pathlib import Path

import pytest
import torch
from helpers.decoding import opened
from helpers.engines import engine_of, requests_of
from helpers.models import whole_model
from helpers.tools import ToolsHere

from megatron_ee.inference.decoding_record import DecodingRecord, RecordedLaunch, Recorder, write_record
from megatron_ee.parallel.mesh import Mesh

KNOWN = DecodingRecord(
    (4, 8),
    (
        RecordedLaunch(0, 0, 4, tokens=2, rows=2, filled=0, virtual=(0.0, 4.0)),
        RecordedLaunch(1, 4, 8, tokens=1, rows=3, filled=1, virtual=(4.0, 6.0), seconds=(0.0, 1.0)),
        RecordedLaunch(0, 0, 4, tokens=1, rows=1, filled=0, virtual=(4.0, 6.0)),
        RecordedLaunch(1, 4, 8, tokens=0, rows=0, filled=2, virtual=(6.0, 7.0), seconds=(1.0, 4.0)),
        RecordedLaunch(0, 0, 4, tokens=1, rows=1, filled=0, virtual=(7.0, 8.0)),
    ),
)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ToolsHere:
    monkeypatch.chdir(tmp_path)
    write_record(Path("known.json"), KNOWN)
    return ToolsHere(monkeypatch, capsys)


def test_lanes_are_drawn_as_they_were(tool: ToolsHere) -> None:
    done = tool("show_schedule.py", "--decoding", "known.json", "--width", "42", "--output", "lanes.txt")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2 stages, from 0 to 8 (estimated cost): # tokens, + with filled rows")
    assert lines[1] == "0 " + 30 * "#" + 5 * "." + 5 * "#"
    assert lines[2] == "1 " + 20 * "." + 10 * "+" + 5 * "o" + 5 * "."
    assert lines[5].split() == ["0", "1-4", "87.5%", "0.0%", "12.5%", "3", "4", "4", "0"]
    assert lines[6].split() == ["1", "5-8", "25.0%", "12.5%", "62.5%", "2", "1", "3", "3"]
    assert Path("lanes.txt").read_text().splitlines() == lines[:7]


def test_a_window_and_the_other_clock(tool: ToolsHere) -> None:
    done = tool("show_schedule.py", "--decoding", "known.json", "--width", "42", "--window", "4", "8")
    assert done.stdout.splitlines()[2] == "1 " + 20 * "+" + 10 * "o" + 10 * "."
    done = tool("show_schedule.py", "--decoding", "known.json", "--width", "42", "--clock", "seconds")
    lines = done.stdout.splitlines()
    assert "from 0 to 4 (s)" in lines[0]
    assert lines[1] == "0 " + 40 * ".", "of another process, whose times are not known"
    assert lines[2] == "1 " + 10 * "+" + 30 * "o"


def test_a_recorded_engine_is_drawn(tool: ToolsHere, mesh: Mesh) -> None:
    model = opened(whole_model(mesh, exits=[2, 5], dtype=torch.float64))
    recorder = Recorder()
    engine = engine_of(model, "compaction", residents=3, stops=(3, 6, 8), recorder=recorder)
    for request in requests_of(1, 6):
        engine.add(request)
    said = 0
    while not engine.is_idle:
        said += len(engine.step())
    write_record(Path("real.json"), recorder.record)
    for output in ("lanes.png", "again.png", "lanes.svg"):
        done = tool("show_schedule.py", "--decoding", "real.json", "--output", output, "--width", "80")
        assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "lanes.svg"
    assert Path("lanes.png").read_bytes() == Path("again.png").read_bytes()
    assert Path("lanes.png").read_bytes().startswith(b"\x89PNG")
    work = engine.batch.walk.work
    launches = [int(line.split()[5]) for line in lines[6:9]]
    assert sum(launches) == sum(work.launches.values()) > said / 3
    rows = [sum(map(int, line.split()[7:9])) for line in lines[6:9]]
    assert sum(rows) >= sum(work.rows.values())
    by_real_time = tool("show_schedule.py", "--decoding", "real.json", "--clock", "seconds")
    assert by_real_time.returncode == 0, "all stages are in this process"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--decoding", "none.json"], "none.json: cannot be read as JSON"),
        (["--decoding", "known.json", "--output", "lanes.pdf"], "--output: lanes.pdf must end in one of .txt, .png"),
        (["--decoding", "known.json", "--window", "9", "12"], "nothing was recorded from 9 to 12, only from 0 to 8"),
        (["--decoding", "empty.json"], "the record has no launch by the virtual clock"),
        ([], "name a CONFIG, or --decoding FILE"),
        (["run.yaml", "--decoding", "known.json"], "--decoding goes with neither CONFIG nor --trace nor --world-size"),
        (["run.yaml", "--clock", "seconds"], "--clock and --window are for --decoding"),
        (["--decoding", "known.json", "--window", "2", "1"], "--window: 2 is not before 1"),
    ],
)
def test_what_a_user_got_wrong_is_one_message(tool: ToolsHere, arguments: list[str], said: str) -> None:
    write_record(Path("empty.json"), DecodingRecord((4, 8), ()))
    done = tool("show_schedule.py", *arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
