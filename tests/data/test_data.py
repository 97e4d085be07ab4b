"""The built-in corpus, indexed datasets, and batches by sample number."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import run_config, write_small_dataset
from helpers.tiny import RandomSamples

from megatron_ee.data.corpus import bigram_cross_entropy, documents
from megatron_ee.data.dataset import DatasetError, open_datasets
from megatron_ee.data.indexed import index_path, read_tokens, write_indexed
from megatron_ee.data.loader import BatchLoader
from megatron_ee.parallel.mesh import Mesh, MeshError
from megatron_ee.tokenizer import ByteTokenizer, padded_vocab_size


@dataclass
class Place:
    """As much of a mesh as the loader looks at."""

    data_rank: int
    data_size: int

    @dataclass
    class Cpu:
        torch = torch.device("cpu")

    device = Cpu()


def test_documents_end_with_their_own_token_and_read_back(tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "two"
    write_indexed(prefix, ["abc", "ü"], ByteTokenizer())
    assert read_tokens(prefix).tolist() == [97, 98, 99, 256, 0xC3, 0xBC, 256]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["two.bin", "two.idx"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield "abc"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_indexed(tmp_path / "broken", broken(), ByteTokenizer())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_standard_library_is_a_corpus() -> None:
    first = next(iter(documents()))
    texts = list(documents())
    assert first == texts[0]
    assert sum(map(len, texts)) > 5_000_000
    assert any("def " in text for text in texts[-20:]), "every split holds code"


def test_bigram_cross_entropy() -> None:
    assert bigram_cross_entropy(np.array([0, 1] * 50, dtype=np.uint16)) == pytest.approx(0)
    random = np.random.default_rng(0).integers(4, size=200_000).astype(np.uint16)
    assert bigram_cross_entropy(random) == pytest.approx(math.log(4), abs=1e-3)


def test_the_tokenizer_keeps_bytes_and_pads_its_vocabulary() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer.encode("größer"), tokenizer.eod, tokenizer.pad]) == "größer"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert padded_vocab_size(tokenizer) == 320


def test_splits_are_disjoint_and_labels_are_the_next_tokens(tmp_path: Path, mesh: Mesh) -> None:
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, training={"eval_iters": 2})
    datasets = open_datasets(config, ByteTokenizer(), mesh)
    assert datasets.valid is not None
    assert not set(datasets.train.indices) & set(datasets.valid.indices)
    sample = datasets.train[0]
    torch.testing.assert_close(sample["tokens"][1:], sample["labels"][:-1])


def test_a_missing_dataset_is_named(tmp_path: Path, mesh: Mesh) -> None:
    with pytest.raises(DatasetError, match=r"data.dataset: .*words.bin does not exist"):
        open_datasets(run_config(tmp_path), ByteTokenizer(), mesh)


def test_an_empty_split_is_named(tmp_path: Path, mesh: Mesh) -> None:
    write_small_dataset(tmp_path)
    assert index_path(tmp_path / "words").exists()
    config = run_config(tmp_path, data={"split": [100, 0, 0]}, training={"eval_iters": 1})
    with pytest.raises(DatasetError, match=r"data\.split: no documents left for validation"):
        open_datasets(config, ByteTokenizer(), mesh)


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 1), (2, 1), (4, 2), (1, 8)])
def test_a_batch_does_not_depend_on_the_ranks(data_size: int, micro_batch_size: int) -> None:
    expected = torch.stack([RandomSamples()[index]["tokens"] for index in range(16, 24)])
    shares = []
    for data_rank in range(data_size):
        place = Place(data_rank, data_size)
        loader = BatchLoader(
            RandomSamples(),
            place,  # type: ignore[arg-type]
            global_batch_size=8,
            micro_batch_size=micro_batch_size,
        )
        batch = loader.batch(16)
        assert batch.num_microbatches == loader.num_microbatches == 8 // (data_size * micro_batch_size)
        shares.append(batch.tokens_MBS)
    together = torch.stack(shares, dim=1).flatten(0, 2)
    torch.testing.assert_close(together, expected)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(MeshError, match=r"training.global_batch_size: 8 must be a multiple of .* = 3 x 1"):
        BatchLoader(RandomSamples(), Place(0, 1), global_batch_size=8, micro_batch_size=3)  # type: ignore[arg-type]
