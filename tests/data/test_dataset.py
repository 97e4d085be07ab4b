"""A run's datasets: splits, blends, index caches, and datasets that don't belong to the run."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import run_config, write_small_dataset
from helpers.tokenizers import write_bpe
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ee.config import Config
from megatron_ee.data.dataset import largest_sampled_token, open_datasets
from megatron_ee.data.indexed import read_index, write_indexed
from megatron_ee.data.loader import BatchLoader
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.tokenizer import ByteTokenizer, open_tokenizer


def test_splits_are_disjoint_and_labels_are_the_next_tokens(tmp_path: Path, mesh: Mesh) -> None:
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, training={"eval_iters": 2})
    datasets = open_datasets(config, ByteTokenizer(), mesh)
    assert datasets.valid is not None
    assert not set(datasets.train.indices) & set(datasets.valid.indices)  # type: ignore[attr-defined]
    sample = datasets.train[0]
    torch.testing.assert_close(sample["tokens"][1:], sample["labels"][:-1])


def _write_foreign(prefix: Path, tokens: np.ndarray, document_size: int = 50) -> None:
    """As Megatron's own tools write a dataset: without a .meta.json."""
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=tokens.dtype.type)
    for start in range(0, len(tokens), document_size):
        document = tokens[start : start + document_size]
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(prefix) + ".idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_dataset_of_megatrons_own_tools_is_read_as_it_is(tmp_path: Path, mesh: Mesh, dtype: Any) -> None:
    tokens = (np.arange(4000) % 251).astype(dtype)
    _write_foreign(tmp_path / "words", tokens)
    datasets = open_datasets(run_config(tmp_path, data={"split": [1, 0, 0]}), ByteTokenizer(), mesh)
    sample = datasets.train[0]["tokens"]
    assert sample.dtype == torch.int64
    steps = torch.diff(sample).remainder(251)
    assert (steps == 1).sum() >= len(steps) - 1, "consecutive, but where a document ends"


def _write_letters(folder: Path) -> None:
    """Two datasets that can be told apart: words of a, words of b."""
    for name, letter in (("a", "a"), ("b", "b")):
        write_indexed(folder / name, [f"{letter * 5} " * size for size in range(5, 45)], ByteTokenizer())


def _blend(folder: Path, *weights: float, **training: Any) -> Config:
    entries = [{"path": str(folder / name), "weight": weight} for name, weight in zip("ab", weights, strict=False)]
    return run_config(folder, data={"dataset": entries}, training=training)


def _letters(samples: Any, count: int) -> Counter[str]:
    return Counter("ab"[int((samples[number]["tokens"] == ord("b")).any())] for number in range(count))


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.8), (1.0, 1.0)])
def test_a_blend_keeps_to_its_weights(tmp_path: Path, mesh: Mesh, weights: tuple[float, float]) -> None:
    _write_letters(tmp_path)
    config = _blend(tmp_path, *weights, train_iters=100, eval_iters=10)
    datasets = open_datasets(config, ByteTokenizer(), mesh)
    for samples, count in ((datasets.train, 400), (datasets.valid, 40)):
        assert samples is not None and len(samples) >= count
        drawn = _letters(samples, count)
        assert drawn["a"] / count == pytest.approx(weights[0] / sum(weights), abs=1.5 / count)


def test_a_blend_of_many_small_shares_has_samples_enough(tmp_path: Path, mesh: Mesh) -> None:
    """With megatron-core's own surplus this one raises: the large share is of a dataset without any to spare."""
    for name in "ab":
        write_indexed(tmp_path / name, [f"{name} short text"], ByteTokenizer())
    entries = [{"path": str(tmp_path / "a"), "weight": 0.9}]
    entries += [{"path": str(tmp_path / "b"), "weight": 0.1 / 15} for _ in range(15)]
    config = run_config(tmp_path, data={"dataset": entries, "split": [1, 0, 0]}, training={"train_iters": 25})
    datasets = open_datasets(config, ByteTokenizer(), mesh)
    assert len(datasets.train) >= 100


def test_a_blend_of_one_is_that_dataset(tmp_path: Path, mesh: Mesh) -> None:
    _write_letters(tmp_path)
    one = open_datasets(_blend(tmp_path, 5.0), ByteTokenizer(), mesh).train
    plain = open_datasets(run_config(tmp_path, data={"dataset": str(tmp_path / "a")}), ByteTokenizer(), mesh).train
    assert all(torch.equal(one[number]["tokens"], plain[number]["tokens"]) for number in range(24))


def _global_batch(config: Config) -> tuple[list[Any], int]:
    """This rank's rows of one global batch, and how many index files this rank wrote."""
    written = []
    save = np.save
    np.save = lambda path, *rest, **named: (written.append(path), save(path, *rest, **named))  # type: ignore[assignment]
    try:
        mesh = open_mesh(config.parallel, choose_device("cpu"))
        datasets = open_datasets(config, ByteTokenizer(), mesh)
    finally:
        np.save = save
    sizes = {"global_batch_size": config.training.global_batch_size, "micro_batch_size": 1}
    batch = BatchLoader(datasets.train, mesh, **sizes).batch(8)
    return batch.tokens_MBS.tolist(), len(written)


def test_one_rank_builds_the_indices_and_all_draw_from_the_same_batches(tmp_path: Path, ranks: RankPool) -> None:
    _write_letters(tmp_path)
    config = _blend(tmp_path, 2.0, 1.0, eval_iters=2)
    apart = ranks.run(4, _global_batch, config)
    assert [written > 0 for _, written in apart] == [True, False, False, False]
    ((alone, written_again),) = ranks.run(1, _global_batch, config)
    assert written_again == 0, "the indices are kept"
    assert [rows[0] for rows, _ in apart] == alone
    (kept,) = (tmp_path / "data/cache").iterdir()
    assert not kept.name.endswith(".tmp")


def test_a_half_built_index_is_built_again(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_letters(tmp_path)
    config = _blend(tmp_path, 2.0, 1.0)
    save, saved = np.save, []

    def save_half(path: str, *rest: Any, **named: Any) -> None:
        saved.append(path)
        if len(saved) == 3:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(path, *rest, **named)

    monkeypatch.setattr(np, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        open_datasets(config, ByteTokenizer(), mesh)
    monkeypatch.undo()
    (half,) = (tmp_path / "data/cache").iterdir()
    half.rename(half.with_name(half.name.replace(".tmp", "-of-another-process.tmp")))
    assert len(open_datasets(config, ByteTokenizer(), mesh).train) >= 24


def test_another_dataset_of_the_same_name_has_other_indices(tmp_path: Path, mesh: Mesh) -> None:
    config = run_config(tmp_path)
    for text, count in (("a" * 90, 20), ("b" * 9, 300)):
        write_indexed(tmp_path / "words", [text] * count, ByteTokenizer())
        samples = open_datasets(config, ByteTokenizer(), mesh).train
        assert _letters_only([samples[number]["tokens"] for number in range(24)]) == {text[0]}


def _letters_only(rows: list[torch.Tensor]) -> set[str]:
    return {chr(token) for row in rows for token in row.tolist() if token < 256}


def test_a_missing_dataset_is_named(tmp_path: Path, mesh: Mesh) -> None:
    with pytest.raises(FieldError, match=r"^data\.dataset: .*words\.bin does not exist \(python-stdlib is built in\)$"):
        open_datasets(run_config(tmp_path), ByteTokenizer(), mesh)
    _write_letters(tmp_path)
    (tmp_path / "b.idx").unlink()
    with pytest.raises(FieldError, match=r"^data\.dataset\.1\.path: .*b\.idx does not exist$"):
        open_datasets(_blend(tmp_path, 1.0, 1.0), ByteTokenizer(), mesh)


def test_an_empty_split_is_named(tmp_path: Path, mesh: Mesh) -> None:
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, data={"split": [100, 0, 0]}, training={"eval_iters": 1})
    with pytest.raises(FieldError, match=r"data\.split: no documents left for validation"):
        open_datasets(config, ByteTokenizer(), mesh)


def test_too_few_documents_for_a_split_are_named_and_an_unused_split_may_be_empty(tmp_path: Path, mesh: Mesh) -> None:
    write_indexed(tmp_path / "words", ["early exits " * 50] * 3, ByteTokenizer())
    config = run_config(tmp_path, training={"eval_iters": 1})
    with pytest.raises(FieldError, match=r"^data\.split: no documents left for validation: data\.dataset .* has 3$"):
        open_datasets(config, ByteTokenizer(), mesh)
    assert open_datasets(run_config(tmp_path), ByteTokenizer(), mesh).valid is None


def test_a_dataset_of_another_tokenizer_is_refused(tmp_path: Path, mesh: Mesh) -> None:
    bpe = open_tokenizer(str(write_bpe(tmp_path / "bpe.json")))
    write_indexed(tmp_path / "words", ["early exits " * 50] * 30, bpe)
    config = run_config(tmp_path)
    with pytest.raises(FieldError) as caught:
        open_datasets(config, ByteTokenizer(), mesh)
    assert str(caught.value) == (
        f"data.dataset: {tmp_path}/words was written with tokenizer {bpe.name}, but data.tokenizer bytes is bytes"
    )
    assert len(open_datasets(config, bpe, mesh).train) >= 24


def test_tokens_beyond_the_vocabulary_are_found_before_training(tmp_path: Path, mesh: Mesh) -> None:
    _write_foreign(tmp_path / "words", (np.arange(4000) % 300).astype(np.uint16))
    with pytest.raises(FieldError, match=r"words holds token 299, beyond a vocabulary of 258: name the tokenizer"):
        open_datasets(run_config(tmp_path), ByteTokenizer(), mesh)
    config = run_config(tmp_path, model={"vocab_size": 300})
    assert len(open_datasets(config, ByteTokenizer(), mesh).train) >= 24


def test_a_large_dataset_is_sampled_from_end_to_end(tmp_path: Path) -> None:
    tokens = np.zeros(3_000_000, dtype=np.uint16)
    tokens[-1] = 7
    _write_foreign(tmp_path / "big", tokens, 1_000_000)
    assert largest_sampled_token(tmp_path / "big", read_index(tmp_path / "big")) == 7
    tokens[:] = np.arange(len(tokens)) % 9000
    _write_foreign(tmp_path / "big", tokens, 1_000_000)
    assert largest_sampled_token(tmp_path / "big", read_index(tmp_path / "big")) == 8999
