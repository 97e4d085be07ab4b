"""Prompts of unlike kinds: as many of each, the same with the same seed, and back from their file as they were."""

import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_ee.data.corpus import documents
from megatron_ee.errors import FieldError
from megatron_ee.inference.prompts import read_prompts
from megatron_ee.inference.scheduling.mixed_prompts import (
    HELD_OUT,
    KINDS,
    MixedPrompt,
    mixed_prompts,
    read_mixed_prompts,
    write_mixed_prompts,
)
from megatron_ee.inference.scheduling.workload import Lengths, arrivals


def test_the_same_seed_is_the_same_file(tmp_path: Path) -> None:
    times = list(arrivals("bursts", 40, 2.0, random.Random(0)))
    drawn, files = [mixed_prompts(40, seed, times=times) for seed in (7, 7, 8)], []
    for number, of in enumerate(drawn):
        write_mixed_prompts(tmp_path / f"{number}.jsonl", of)
        files.append((tmp_path / f"{number}.jsonl").read_bytes())
    assert files[0] == files[1] != files[2]
    prompts = drawn[0]
    assert read_mixed_prompts(tmp_path / "0.jsonl") == prompts
    assert read_prompts(tmp_path / "0.jsonl") == [of.prompt for of in prompts], "the inference command reads it"
    assert [of.arrival for of in prompts] == times


def test_kinds_and_answers_are_as_many_of_each() -> None:
    prompts = mixed_prompts(
        160, 0, characters=Lengths(50, 0.0), short=Lengths(4, 0.2, most=9), long=Lengths(60, 0.2, most=90)
    )
    by_kind = Counter((of.kind, of.new_tokens > 9) for of in prompts)
    assert by_kind == {(kind, long): 20 for kind in KINDS for long in (False, True)}
    assert {of.arrival for of in prompts} == {0.0}
    texts = {kind: [of.prompt for of in prompts if of.kind == kind] for kind in KINDS}
    assert all(len(text) == 50 for kind in ("prose", "numbers", "bytes") for text in texts[kind])
    assert all(0 < len(text) <= 50 for text in texts["code"])
    assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) for line in texts["numbers"][0].split("\n")[:-1])
    assert set("".join(texts["bytes"])) > set(map(chr, range(0x20, 0x7F)))


def test_code_and_prose_are_of_documents_that_training_does_not_see() -> None:
    every = list(documents())
    seen, held_out = every[: int(0.95 * len(every))], every[int(0.95 * len(every)) :]
    assert set(documents(last=HELD_OUT)) <= set(held_out)
    prompts = mixed_prompts(40, 1, characters=Lengths(300, 0.0))
    code = [of.prompt for of in prompts if of.kind == "code"]
    assert all(any(text in document for document in held_out) for text in code)
    assert sum(any(text in document for document in seen) for text in code) <= 1, "licences are in many files"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"kind": "code", "prompt": "a", "new_tokens": 1}',
        '{"kind": "verse", "prompt": "a", "new_tokens": 1, "arrival": 0}',
        '{"kind": "code", "prompt": "", "new_tokens": 1, "arrival": 0}',
        '{"kind": "code", "prompt": "a", "new_tokens": 0, "arrival": 0}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write_mixed_prompts(tmp_path / "load.jsonl", [MixedPrompt("code", "def ", 3)])
    with (tmp_path / "load.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FieldError, match=r"load\.jsonl:2"):
        read_mixed_prompts(tmp_path / "load.jsonl")
