"""Shards reach the tensors that want them, however the two lie; whole ones without a copy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_ee.checkpoint import verify
from megatron_ee.checkpoint.checksum import checksum_of
from megatron_ee.checkpoint.folders import CheckpointError
from megatron_ee.checkpoint.places import read_places
from megatron_ee.checkpoint.sharded import load_checkpoint, model_state
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer

STORED_AB = torch.arange(42.0).view(6, 7)


class _Planner:
    """Gives each item the target of its number."""

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        self._targets, self.committed = targets, set[str]()

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self._targets[int(item.dest_index.fqn)]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed.add(item.dest_index.fqn)


def _read(folder: Path, *wanted: tuple[torch.Tensor, torch.Tensor, Sequence[int]]) -> dict[str, str]:
    """Fill targets from files of two tensors each, beginning at offsets in them; returns the checksums of files."""
    from megatron_ee.checkpoint.reading import ShardReader  # it imports megatron-core

    checksums: dict[str, str] = {}
    reader, items = ShardReader(folder, checksums), []
    for number, (stored, target, offsets) in enumerate(wanted):
        path, index = folder / f"{number // 2}.distcp", MetadataIndex(str(number))
        with path.open("ab") as file:
            start = file.tell()
            torch.save(stored, file)
            reader.storage_data[index] = _StorageInfo(path.name, start, file.tell() - start)
        zeros = torch.Size([0] * target.dim())
        items.append(ReadItem(LoadItemType.TENSOR, index, zeros, index, torch.Size(offsets), torch.Size(target.shape)))
    planner: Any = _Planner([target for _, target, _ in wanted])
    reader.read_data(LoadPlan(items[::-1]), planner).wait()
    assert len(planner.committed) == len(items)
    return checksums


PARTS: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int]]]] = {
    "whole": lambda: (STORED_AB, torch.zeros(6, 7), STORED_AB, (0, 0)),
    "rows": lambda: (STORED_AB, torch.zeros(2, 7), STORED_AB[3:5], (3, 0)),
    "columns": lambda: (STORED_AB, torch.zeros(6, 3), STORED_AB[:, 2:5], (0, 2)),
    "block": lambda: (STORED_AB, torch.zeros(2, 3), STORED_AB[4:, 4:], (4, 4)),
    "into columns": lambda: (STORED_AB, torch.zeros(6, 20)[:, 5:12], STORED_AB, (0, 0)),
    "stored by columns": lambda: (STORED_AB.T.contiguous().T, torch.zeros(6, 7), STORED_AB, (0, 0)),
    "rows stored by columns": lambda: (STORED_AB.T.contiguous().T, torch.zeros(2, 7), STORED_AB[1:3], (1, 0)),
    "of a larger storage": lambda: (STORED_AB[2:], torch.zeros(3, 7), STORED_AB[3:], (1, 0)),
    "another dtype": lambda: (STORED_AB.double(), torch.zeros(2, 7), STORED_AB[:2], (0, 0)),
    "half precision": lambda: (STORED_AB.bfloat16(), torch.zeros(6, 7).bfloat16(), STORED_AB.bfloat16(), (0, 0)),
    "scalar": lambda: (torch.tensor(7), torch.tensor(0), torch.tensor(7), ()),
    "empty": lambda: (torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3), (0, 0)),
}


@pytest.mark.usefixtures("cpu")
def test_every_part_reaches_its_target(tmp_path: Path) -> None:
    parts = [make() for make in PARTS.values()]
    _read(tmp_path, *((stored, target, offsets) for stored, target, _, offsets in parts))
    for name, (_, target, expected, _) in zip(PARTS, parts, strict=True):
        assert torch.equal(target, expected), name


@pytest.mark.usefixtures("cpu")
def test_what_lies_around_a_target_stays(tmp_path: Path) -> None:
    around_AB = torch.full((8, 7), -1.0)
    _read(tmp_path, (STORED_AB, around_AB[1:7], (0, 0)))
    assert torch.equal(around_AB[1:7], STORED_AB)
    assert (around_AB[[0, 7]] == -1).all()


@pytest.mark.usefixtures("cpu")
def test_a_shard_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"is \(6,\), not \(6, 7\)"):
        _read(tmp_path, (torch.arange(7.0), torch.zeros(6, 7), (0,)))


@pytest.mark.usefixtures("cpu")
def test_a_file_that_is_read_whole_has_a_checksum(tmp_path: Path) -> None:
    large_A = torch.arange(50000.0)
    tensors = (large_A, STORED_AB, large_A.half())
    wholes = [(stored, torch.empty_like(stored), (0,) * stored.dim()) for stored in tensors]
    rows = (large_A, torch.empty(10), (100,))  # leaves out more than lies between tensors
    checksums = _read(tmp_path, *wholes, *wholes[:1], rows, *wholes[1:2])
    assert checksums == {name: checksum_of((tmp_path / name).read_bytes()) for name in ("0.distcp", "1.distcp")}


@pytest.mark.usefixtures("cpu")
def test_what_lies_between_parts_belongs_to_the_checksum(tmp_path: Path) -> None:
    parts = [make() for make in PARTS.values()]
    checksums = _read(tmp_path, *((stored, target, offsets) for stored, target, _, offsets in parts))
    assert checksums == {path.name: checksum_of(path.read_bytes()) for path in tmp_path.iterdir()}


def _train_one(config: Config) -> None:
    train(config, until=1, save=True)


def _loaded_elsewhere(config: Config, step: Path) -> set[str]:
    """Names of what is not read into the memory where it belongs."""
    trainer = build_trainer(config, choose_device("cpu"))
    model = model_state(trainer.stage, trainer.mesh)
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=True)
    where = {(name, parameter.data_ptr()) for name, parameter in trainer.stage.named_parameters()}
    for name, kinds in optimizer["tensors"].items():
        where |= {(f"{name} {kind}", shard.data.data_ptr()) for kind, shard in kinds.items()}
    state = load_checkpoint(step, {"model": model, "optimizer": optimizer})
    loaded = {(name, tensor.data_ptr()) for name, tensor in state["model"].items()}
    for name, kinds in state["optimizer"]["tensors"].items():
        loaded |= {(f"{name} {kind}", tensor.data_ptr()) for kind, tensor in kinds.items()}
    return {name for name, _ in where ^ loaded}


def test_nothing_is_loaded_anywhere_but_where_it_belongs(tmp_path: Path, ranks: RankPool) -> None:
    """Parts that are apart on disk, as a gate and what it gates, are joined by where they are read."""
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, name="whole", parallel={"pipeline": 2})
    ranks.run(2, _train_one, config)
    for apart in ranks.run(2, _loaded_elsewhere, config, tmp_path / "runs/whole/checkpoints/step_00000001"):
        assert not apart


def _hashed_apart(config: Config) -> list[str]:
    """Names of the files that a resume reads for their checksums alone."""
    names = []

    def damage_of(path: Path, checksum: str) -> str:
        names.append(path.name)
        return genuine(path, checksum)

    genuine, verify.damage_of = verify.damage_of, damage_of
    try:
        build_trainer(config, choose_device("cpu"))
    finally:
        verify.damage_of = genuine
    return names


def test_shards_are_read_once_and_verified_on_the_way(tmp_path: Path, ranks: RankPool) -> None:
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, name="whole", parallel={"pipeline": 2})
    ranks.run(2, _train_one, config)
    names = sorted(name for of_rank in ranks.run(2, _hashed_apart, config) for name in of_rank)
    assert names == [".metadata", "common.pt", "config.yaml", "metadata.json", "places.json"]


def _found_by_torch(step: Path) -> dict[str, dict[int, int]]:
    """Where the shards of a step folder begin, and their bytes, by what the files say themselves."""
    from megatron_ee.checkpoint.reading import ShardReader

    reader, places = ShardReader(step), dict[str, dict[int, int]]()
    for shard in reader.read_metadata().storage_data.values():
        with (step / shard.relative_path).open("rb") as file:
            stored = torch.load(reader._slice_file(file, shard), map_location="meta", weights_only=True)
        place = shard.offset + stored.untyped_storage()._checkpoint_offset
        places.setdefault(shard.relative_path, {})[shard.offset] = place
    return places


@pytest.mark.usefixtures("cpu")
def test_places_are_where_the_bytes_are(tmp_path: Path, ranks: RankPool) -> None:
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, name="whole", parallel={"pipeline": 2})
    ranks.run(2, _train_one, config)
    step = tmp_path / "runs/whole/checkpoints/step_00000001"
    assert read_places(step) == _found_by_torch(step)


def _parsed_when_loaded(config: Config) -> int:
    """How many shards a resume looks for the bytes in."""
    from megatron_ee.checkpoint.reading import ShardReader

    found = 0

    def find(self: Any, *arguments: Any) -> Any:
        nonlocal found
        found += 1
        return genuine(self, *arguments)

    genuine, ShardReader._find = ShardReader._find, find  # type: ignore[method-assign]
    try:
        build_trainer(config, choose_device("cpu"))
    finally:
        ShardReader._find = genuine  # type: ignore[method-assign]
    return found


def test_only_a_checkpoint_without_places_is_searched(tmp_path: Path, ranks: RankPool) -> None:
    """One that came from elsewhere, say; its description is not asked here."""
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, name="whole", parallel={"pipeline": 2}, checkpoint={"verify": False})
    ranks.run(2, _train_one, config)
    assert ranks.run(2, _parsed_when_loaded, config) == [0, 0]
    (tmp_path / "runs/whole/checkpoints/step_00000001/places.json").unlink()
    assert all(ranks.run(2, _parsed_when_loaded, config))


@pytest.mark.parametrize("content", ["", "[]", '{"__0_0.distcp": 7}', '{"__0_0.distcp": {"first": 7}}'])
def test_places_that_are_none_are_one_message(tmp_path: Path, content: str) -> None:
    """Where checkpoint.verify is off, nobody has looked at the file before."""
    (tmp_path / "places.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"places\.json cannot be read"):
        read_places(tmp_path)
    assert read_places(tmp_path / "elsewhere") == {}
