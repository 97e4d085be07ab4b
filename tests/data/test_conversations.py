"""Conversations of a run: what is learned, packed and kept; splits; and lines that are none."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.conversations import chat_config, small_talks, talk, write_talks
from helpers.ranks import RankPool
from helpers.tokenizers import BLOCKS, write_chat_tokenizer

from megatron_ee.config import Config
from megatron_ee.data.dataset import open_datasets
from megatron_ee.data.loader import BatchLoader, SampleSource
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.tokenizer import ByteTokenizer, open_tokenizer
from megatron_ee.tokenizer.chat import open_chat_template
from megatron_ee.tokenizer.messages import parse_messages


def _parts(sample: Any) -> list[dict[str, list[int]]]:
    """A sample cut into its documents; one that is not packed ends with its first padding."""
    if "documents" not in sample:
        left = int((sample["tokens"] == ByteTokenizer.pad).sum())
        size = len(sample["tokens"]) - left
        sample["documents"] = torch.arange(2).repeat_interleave(torch.tensor([size, left])).to(torch.int32)
        sample["positions"] = torch.cat([torch.arange(size), torch.arange(left)])
    sizes = np.unique_counts(sample["documents"].numpy()).counts.tolist()
    columns = {name: column.split(sizes) for name, column in sample.items()}
    return [{name: column[i].tolist() for name, column in columns.items()} for i in range(len(sizes))]


@pytest.mark.parametrize("packing", [True, False])
def test_a_sequence_holds_whole_conversations_and_learns_their_answers(
    tmp_path: Path, mesh: Mesh, packing: bool
) -> None:
    write_talks(tmp_path / "talks.jsonl", small_talks())
    config = chat_config(tmp_path, data={"packing": packing, "split": [1, 0, 0]})
    tokenizer = ByteTokenizer()
    template = open_chat_template("default", tokenizer)
    chats = [template.encode(parse_messages(messages)) for messages in small_talks()]
    expected = Counter((tuple(chat.tokens), tuple(chat.learned)) for chat in chats)
    samples, found, index = open_datasets(config, tokenizer, mesh).train, Counter(), 0
    while found.total() < len(chats):
        sample = samples[index]
        assert packing == ("documents" in sample) == ("positions" in sample)
        parts = _parts(sample)
        assert {name: (len(column), column.dtype) for name, column in sample.items()} == {
            "tokens": (160, torch.int64),
            "labels": (160, torch.int64),
            "loss_mask": (160, torch.float32),
            "positions": (160, torch.int64),
            "documents": (160, torch.int32),
        }
        for part in parts:
            assert part["positions"] == list(range(len(part["tokens"])))
            if part["tokens"][0] == tokenizer.pad:
                assert part is parts[-1] and set(part["tokens"]) == {tokenizer.pad} and not any(part["loss_mask"])
                continue
            assert part["tokens"][1:] == part["labels"][:-1]
            whole = (*part["tokens"], part["labels"][-1])
            found[whole, (False, *map(bool, part["loss_mask"]))] += 1
        assert packing or len(parts) <= 2
        index += 1
    assert found == expected
    positions = sum(len(chat.tokens) - 1 for chat in chats)
    assert index == len(chats) if not packing else positions / (index * 160) > 0.75, positions / (index * 160)


def test_a_file_for_validation_leaves_all_others_for_training(tmp_path: Path, mesh: Mesh) -> None:
    write_talks(tmp_path / "talks.jsonl", [talk("q", f"a{number:02}") for number in range(20)])
    write_talks(tmp_path / "valid.jsonl.gz", [talk("q", f"v{number:02}") for number in range(4)])
    names = {"validation": str(tmp_path / "valid.jsonl.gz"), "packing": False}
    datasets = open_datasets(chat_config(tmp_path, data=names, training={"eval_iters": 1}), ByteTokenizer(), mesh)
    assert datasets.valid is not None
    assert _answers(datasets.train, 20) == {f"a{number:02}" for number in range(20)}
    assert _answers(datasets.valid, 4) == {f"v{number:02}" for number in range(4)}
    assert (len(datasets.train), len(datasets.valid)) == (24, 4)


def _answers(samples: SampleSource, count: int) -> set[str]:
    answers = set()
    for index in range(count):
        sample = samples[index]
        answers.add(ByteTokenizer().decode(sample["labels"][sample["loss_mask"] > 0].tolist()))
    return answers


def test_without_one_the_seed_draws_the_splits(tmp_path: Path, mesh: Mesh) -> None:
    write_talks(tmp_path / "talks.jsonl", [talk("q", f"a{number:02}") for number in range(20)])
    drawn = []
    for seed in (0, 1):
        data = {"split": [70, 20, 10], "packing": False}
        config = chat_config(tmp_path, data=data, training={"eval_iters": 1}, seed=seed)
        datasets = open_datasets(config, ByteTokenizer(), mesh)
        assert datasets.valid is not None
        train, valid = _answers(datasets.train, 14), _answers(datasets.valid, 4)
        assert (len(train), len(valid), len(train | valid)) == (14, 4, 18)
        drawn.append(valid)
    assert drawn[0] != drawn[1]
    config = chat_config(tmp_path, data={"split": [100, 0, 0]}, training={"eval_iters": 1})
    with pytest.raises(FieldError, match=r"^data\.split: no conversations left for validation: .*talks\.jsonl has 20$"):
        open_datasets(config, ByteTokenizer(), mesh)


def test_what_is_too_long_is_left_out_and_said_once(
    tmp_path: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    talks = [talk("q", "a"), talk("q", "b" * 200), talk("q", "c"), talk("q", "d" * 300)]
    write_talks(tmp_path / "talks.jsonl", talks)
    config = chat_config(tmp_path, data={"split": [1, 0, 0], "packing": False})
    for _ in ("encoded", "kept"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "megatron_ee"):
            samples = open_datasets(config, ByteTokenizer(), mesh).train
        assert [record.message for record in caplog.records] == [
            f"data.dataset: 2 of 4 conversations in {tmp_path}/talks.jsonl are LEFT OUT, longer than "
            f"data.sequence_length = 160 (the first in line 2: 219)"
        ]
        assert _answers(samples, 2) == {"a", "c"}


def test_the_longest_that_fits_fits_exactly(tmp_path: Path, mesh: Mesh) -> None:
    write_talks(tmp_path / "talks.jsonl", [talk("q", "a" * 141), talk("q", "b" * 142)])
    samples = open_datasets(chat_config(tmp_path, data={"split": [1, 0, 0]}), ByteTokenizer(), mesh).train
    assert samples[0]["labels"][-1] == ByteTokenizer.eod and samples[0]["loss_mask"][-1] == 1
    assert all(_answers(samples, number) == {"a" * 141} for number in (1, 2, 3))


LINES = {
    "no JSON": ('{"messages": [', "talks.jsonl:3: not JSON (Expecting value"),
    "no UTF-8": (b"\xff\xfe", "talks.jsonl:3: not JSON ('utf-8' codec can't decode byte 0xff"),
    "no object": ("[1]", "talks.jsonl:3: no JSON object with messages"),
    "another key": ('{"message": []}', "talks.jsonl:3: no JSON object with messages; did you mean 'message'?"),
    "no messages": ('{"messages": []}', "talks.jsonl:3: messages: empty: it needs at least one message"),
    "a role": (
        '{"messages": [{"role": "bot", "content": "a"}]}',
        "talks.jsonl:3: messages.0.role: 'bot' must be one of system, user, assistant",
    ),
    "no answer": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "talks.jsonl:3: no message of the assistant: there is nothing to learn",
    ),
    "an empty answer": (json.dumps({"messages": talk("q", " ")}), "talks.jsonl:3: messages.1.content: an empty answer"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_no_conversation_is_named(name: str, tmp_path: Path, mesh: Mesh) -> None:
    line, message = LINES[name]
    good = json.dumps({"messages": talk("q", "a"), "id": 7}).encode()
    bad = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "talks.jsonl").write_bytes(good + b"\n\n" + bad + b"\n")
    with pytest.raises(FieldError) as caught:
        open_datasets(chat_config(tmp_path), ByteTokenizer(), mesh)
    assert str(caught.value).startswith(f"data.dataset: {tmp_path}/{message}")
    assert not list((tmp_path / "data/conversations").iterdir()), "nothing half-written is kept"


def test_no_file_and_no_conversation_are_named(tmp_path: Path, mesh: Mesh) -> None:
    config = chat_config(tmp_path)
    with pytest.raises(FieldError, match=r"^data\.dataset: .*talks\.jsonl: cannot be read \(No such file"):
        open_datasets(config, ByteTokenizer(), mesh)
    (tmp_path / "talks.jsonl").write_text("\n \n")
    with pytest.raises(FieldError, match=r"^data\.dataset: .*talks\.jsonl holds no conversation$"):
        open_datasets(config, ByteTokenizer(), mesh)
    write_talks(tmp_path / "talks.jsonl", [talk("q", "a" * 200)] * 2)
    with pytest.raises(FieldError, match=r"holds no conversation: all 2 are longer than data\.sequence_length = 160$"):
        open_datasets(config, ByteTokenizer(), mesh)
    (tmp_path / "no.jsonl.gz").write_text("plain")
    with pytest.raises(FieldError, match=r"^data\.dataset: .*no\.jsonl\.gz: cannot be read \(Not a gzipped file"):
        open_datasets(chat_config(tmp_path, data={"dataset": str(tmp_path / "no.jsonl.gz")}), ByteTokenizer(), mesh)


def test_a_template_that_refuses_a_conversation_names_its_line(tmp_path: Path, mesh: Mesh) -> None:
    write_talks(tmp_path / "talks.jsonl", [talk("q", "a"), [{"role": "system", "content": "s"}, *talk("q", "a")]])
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(source + "{{ m.content }}{{ eos_token }}{% endfor %}")
    config = chat_config(tmp_path, data={"chat_template": str(tmp_path / "own.jinja")})
    with pytest.raises(FieldError) as caught:
        open_datasets(config, ByteTokenizer(), mesh)
    assert str(caught.value) == f"data.dataset: {tmp_path}/talks.jsonl:2: the chat template fails: no system"


def test_what_is_kept_is_of_this_content_template_and_length(tmp_path: Path, mesh: Mesh) -> None:
    path = write_talks(tmp_path / "talks.jsonl", small_talks())
    folder = write_chat_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "own.jinja").write_text(BLOCKS)

    def keep(**data: Any) -> int:
        name = str(data.get("tokenizer", folder))
        open_datasets(chat_config(tmp_path, data={"tokenizer": name, **data}), open_tokenizer(name), mesh)
        return len(list((tmp_path / "data/conversations").iterdir()))

    assert [keep(), keep(), keep(packing=False)] == [1, 1, 1]
    assert [keep(sequence_length=200), keep(chat_template=str(tmp_path / "own.jinja"))] == [2, 3]
    assert keep(tokenizer="bytes") == 4
    write_talks(path, small_talks(59))
    assert keep() == 5
    path.rename(tmp_path / "moved.jsonl")
    assert keep(dataset=str(tmp_path / "moved.jsonl")) == 5


def test_damage_to_what_is_kept_is_named(tmp_path: Path, mesh: Mesh) -> None:
    write_talks(tmp_path / "talks.jsonl", small_talks())
    open_datasets(chat_config(tmp_path), ByteTokenizer(), mesh)
    (kept,) = (tmp_path / "data/conversations").iterdir()
    np.save(kept / "tokens.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(FieldError, match=r"^data\.folder: .* is damaged: remove it \(Array can't be memory-mapped"):
        open_datasets(chat_config(tmp_path), ByteTokenizer(), mesh)
    np.save(kept / "tokens.npy", np.zeros(3, dtype=np.int32))
    with pytest.raises(FieldError, match=r"is damaged: remove it \(its parts are of different lengths\)"):
        open_datasets(chat_config(tmp_path), ByteTokenizer(), mesh)


def _global_batch(config: Config) -> tuple[list[Any], list[Any], list[str]]:
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    samples = open_datasets(config, ByteTokenizer(), mesh).train
    batch = BatchLoader(samples, mesh, global_batch_size=4, micro_batch_size=1).batch(6)
    assert batch.documents_MBS is not None
    kept = [path.name for path in (Path(config.data.folder) / "conversations").iterdir()]
    return batch.tokens_MBS.tolist(), batch.documents_MBS.tolist(), kept


def test_one_rank_encodes_and_all_draw_from_the_same_batches(tmp_path: Path, ranks: RankPool) -> None:
    write_talks(tmp_path / "talks.jsonl", small_talks())
    config = chat_config(tmp_path)
    apart = ranks.run(4, _global_batch, config)
    ((tokens, documents, kept),) = ranks.run(1, _global_batch, config)
    assert [rows[0] for rows, _, _ in apart] == tokens
    assert [rows[0] for _, rows, _ in apart] == documents
    assert all(names == kept for _, _, names in apart) and len(kept) == 1
