"""The Python of the page on decoding is run as it stands there, on a run of that name."""

import re
from pathlib import Path

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset

PAGE = Path(__file__).parent.parent / "docs/decoding.md"
EXAMPLES = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_its_examples_run_one_after_the_other(
    tmp_path: Path, ranks: RankPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small_dataset(tmp_path)
    ranks.run(1, train_and_save, run_config(tmp_path, name="demo", training={"train_iters": 1}))
    monkeypatch.chdir(tmp_path)
    examples, names = EXAMPLES.findall(PAGE.read_text()), {}
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith(" layers a token")]) == 2
    assert len([line for line in lines if line.endswith(("length", "stop"))]) == 2
    assert len([line for line in lines if line.endswith(" nats a token")]) == 2
