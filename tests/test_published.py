"""Configs of published runs: each is estimated as its head says, fits into its GPUs, and has its model's size."""

import re
import sys
from pathlib import Path

import pytest

from megatron_ee.config import __main__ as look
from megatron_ee.config import load_config

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs/published").glob("*.yaml"))}
PAGE = (ROOT / "docs/published.md").read_text()
GPU_BYTES = 80e9

# Parameters of the model without exits of its own, as published.
SIZES = {
    "layerskip_7b": 6_738_415_616,  # Llama 2
    "layerskip_8b": 8_030_261_248,  # Llama 3
    "layerskip_code_7b": 6_738_546_688,  # CodeLlama: 16 more tokens
    "ee_tuning_13b": 13_015_864_320,  # Llama 2
    "ee_tuning_70b": 68_976_648_192,
}

# Of others, the billions in their name; theirs have exits.
BILLIONS = re.compile(r"_([\d.]+)b$")


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _world_size(name: str) -> int:
    (written,) = re.findall(r"^# world size: (\d+)$", CONFIGS[name].read_text(), re.MULTILINE)
    return int(written)


def _row(name: str) -> list[str]:
    """Of the page's table."""
    (row,) = [line for line in PAGE.splitlines() if f"[{name}](" in line]
    return [cell.strip() for cell in row.strip("|").split("|")]


def _gib(size: str) -> float:
    number, unit = size.split()
    return float(number) * {"MiB": 1 / 1024, "GiB": 1.0}[unit]


def test_it_is_estimated_and_the_page_says_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its data, its tokenizer and the model that it begins with."""
    monkeypatch.chdir("/")
    world_size = _world_size(name)
    monkeypatch.setattr(sys, "argv", ["config", "--world-size", str(world_size), "--estimate", str(CONFIGS[name])])
    status = look.main()
    said = capsys.readouterr()
    assert status == 0, said.err
    counts = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", said.out.splitlines()[0])]
    size = counts[0] - sum(counts[1:])  # exits that are trained alone are not the model's own
    if name in SIZES:
        assert size == SIZES[name]
    else:
        assert size == pytest.approx(1e9 * float(BILLIONS.search(name)[1]), rel=0.1)  # type: ignore[index]
    _, *of_ranks = map(_gib, re.findall(r"([\d.]+ [MG]iB)$", said.out, re.MULTILINE))  # the first is the checkpoint's
    largest = max(of_ranks)
    assert largest * 2**30 < GPU_BYTES
    bubble = re.search(r"bubble: ([\d.]+%)", said.out)[1]  # type: ignore[index]
    assert _row(name)[1:4] == [str(world_size), f"{largest:.1f} GiB", bubble]


def test_only_what_a_user_has_to_bring_is_missing(name: str) -> None:
    """No path of a config is something that would train on other data unnoticed."""
    config = load_config(CONFIGS[name])
    datasets = (
        [config.data.dataset] if isinstance(config.data.dataset, str) else [entry.path for entry in config.data.dataset]
    )
    for path in (*datasets, config.data.tokenizer):
        assert path not in ("python-stdlib", "bytes")
        assert not (ROOT / path).exists()
    from_scratch = name.startswith("ee_llm") or name == "layerskip_1.5b"
    assert (config.checkpoint.initial is None) == from_scratch
