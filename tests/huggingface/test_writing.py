"""Files of tensors that are never in memory together, as the format's own library reads them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from megatron_ee.errors import UserError
from megatron_ee.huggingface.headers import read_header
from megatron_ee.huggingface.writing import parse_size, plan_shards, write_tensors

SHAPES = {"a": (3, 5), "b": (7,), "c": (0, 4), "d": (1, 1)}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_formats_own_library_reads_them(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    path = tmp_path / "x.safetensors"
    write_tensors(path, SHAPES, precision, lambda name: tensors[name].split(2))  # type: ignore[arg-type]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == list(SHAPES)
        for name, value in tensors.items():
            assert torch.equal(file.get_tensor(name), value)
    assert {name: stored.shape for name, stored in read_header(path).items()} == SHAPES


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {}, "fp32", lambda _name: [])
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.keys()) == []
    assert read_header(tmp_path / "x.safetensors") == {}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 100))
def test_files_are_no_larger_than_asked_for_and_hold_all(heights: list[int], shard_size: int) -> None:
    shapes = {f"{number}": (height,) for number, height in enumerate(heights)}
    shards = plan_shards(shapes, "bf16", shard_size)
    assert [name for shard in shards for name in shard.tensors] == list(shapes)
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        size = sum(2 * height for (height,) in shard.tensors.values())
        assert size <= shard_size or len(shard.tensors) == 1
        if following is not None:
            assert size + 2 * next(iter(following.tensors.values()))[0] > shard_size, "it would have had room"
    names = [shard.file for shard in shards]
    if len(names) == 1:
        assert names == ["model.safetensors"]
    else:
        assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("1.5 KB", 1500), ("77", 77), ("10B", 10)],
)
def test_sizes_are_written_as_people_do(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1GB", "0", "nan", "1e999", "five"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard-size: .* is no size"):
        parse_size(text)
