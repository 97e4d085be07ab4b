"""A folder that is not what it should be is refused in one line that names the file or the tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.huggingface import rewrite_config, save_model, tensors_of
from safetensors.torch import save_file

from megatron_ee.errors import UserError
from megatron_ee.huggingface.folder import open_folder
from megatron_ee.huggingface.headers import LENGTH

HEAD = "lm_head.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved"), "Llama", shard_size="60KB")


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """A Llama in several files, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _file(folder: Path, number: int) -> Path:
    return next(folder.glob(f"model-{number:05d}-of-*"))


def _cut(folder: Path, length: int) -> None:
    path = _file(folder, 2)
    path.write_bytes(path.read_bytes()[:length])


def _edit(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors, and write all of them as one file."""
    tensors = tensors_of(folder)
    edit(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_index(folder: Path, **places: str) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= places
    path.write_text(json.dumps(content))


def _edit_header(folder: Path, **fields: object) -> None:
    """Change what a header says of the first tensor of its file."""
    path = _file(folder, 1)
    content = path.read_bytes()
    (length,) = LENGTH.unpack(content[:8])
    header = json.loads(content[8 : 8 + length])
    next(entry for name, entry in header.items() if name != "__metadata__").update(fields)
    new = json.dumps(header).encode()
    path.write_bytes(LENGTH.pack(len(new)) + new + content[8 + length :])


def _to_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _swap_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = tensors[NORM].bfloat16()


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = tensors[NORM][:-1].clone()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in a tensor": (lambda folder: _cut(folder, -9), r"model-00002-of-\d+\.safetensors: cut off: \S+ ends at byte"),
    "cut in the header": (lambda folder: _cut(folder, 99), r"model-00002-of-\d+\.safetensors: cut off or damaged"),
    "empty": (lambda folder: _cut(folder, 0), r"model-00002-of-\d+\.safetensors: cut off or damaged"),
    "a missing file": (lambda folder: _file(folder, 3).unlink(), r"model-00003-of-\S+: No such file or directory"),
    "no file of tensors": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "model: has neither model.safetensors nor model.safetensors.index.json",
    ),
    "pickles": (_to_pickles, r"model: pytorch_model\.bin is a pickle, which can run any code: it is not loaded"),
    "a missing tensor": (
        lambda folder: _edit(folder, lambda tensors: tensors.pop(NORM)),
        f"model: the tensor {NORM} is missing",
    ),
    "a tensor in the index alone": (
        lambda folder: _edit_index(folder, more=_file(folder, 1).name),
        r"model-00001-of-\S+: lacks more, which model.safetensors.index.json says it has",
    ),
    "an index that points out": (
        lambda folder: _edit_index(folder, **{NORM: "../model.safetensors"}),
        r"index\.json: \S+input_layernorm\.weight is said to be in '\.\./model\.safetensors', out of the folder",
    ),
    "an index of something else": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 1}'),
        "has no weight_map",
    ),
    "a wrong shape": (
        lambda folder: _edit(folder, _reshape),
        rf"model\.safetensors: {NORM} is \[31\], not \[32\]",
    ),
    "a tensor too many": (
        lambda folder: _edit(folder, lambda tensors: tensors.update(more=torch.ones(1))),
        r"model\.safetensors: more: a LlamaForCausalLM has no such tensor",
    ),
    "two dtypes": (
        lambda folder: _edit(folder, _swap_dtype),
        rf"model\.safetensors: (\S+ is F32 and \S+ is BF16|{NORM} is BF16 and \S+ is F32): all have to be of one",
    ),
    "double": (
        lambda folder: _edit(folder, lambda tensors: tensors.update({NORM: tensors[NORM].double()})),
        rf"model\.safetensors: {NORM} is F64; only F32, BF16, F16 can be read",
    ),
    "tied and stored apart": (
        lambda folder: rewrite_config(folder, tie_word_embeddings=True),
        f"{HEAD} is not model.embed_tokens.weight, though tie_word_embeddings says so",
    ),
    "a header that is none": (
        lambda folder: _file(folder, 1).write_bytes(LENGTH.pack(4) + b"{{}}"),
        "damaged: its header is not one of safetensors",
    ),
    "offsets that lie": (
        lambda folder: _edit_header(folder, data_offsets=[0, 8]),
        "damaged: its header is not one of safetensors",
    ),
    "an unknown dtype": (
        lambda folder: _edit_header(folder, dtype="F4"),
        "damaged: its header is not one of safetensors",
    ),
    "another architecture": (
        lambda folder: rewrite_config(folder, architectures=["GPT2LMHeadModel"]),
        r'config\.json: architectures is \["GPT2LMHeadModel"\]: only one of LlamaForCausalLM',
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: No such file or directory"),
    "exits of another version": (
        lambda folder: (folder / "exits.json").write_text('{"version": 9}'),
        r"exits\.json: version is 9: this release reads 1",
    ),
    "exits without parameters": (
        lambda folder: (folder / "exits.json").write_text(_exits([2])),
        r"exits\.safetensors: No such file or directory",
    ),
    "exits of a deeper model": (
        lambda folder: (folder / "exits.json").write_text(_exits([4])),
        r"exits\.json: an exit after layer 4, but the model has 4",
    ),
}


def _exits(layers: list[int]) -> str:
    kinds = {"heads": "norm", "projections": "shared", "temperatures": 1.0, "gates": "none"}
    lists = {name: [value] * len(layers) for name, value in kinds.items()}
    return json.dumps({"version": 1, "layers": layers, "norm": "own", **lists})


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(folder: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    open_folder(folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        open_folder(folder)
    assert "\n" not in str(raised.value)


def test_what_a_tied_model_stores_twice_or_old_ones_store_is_no_matter(folder: Path) -> None:
    rewrite_config(folder, tie_word_embeddings=True)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _edit(folder, edit)
    opened = open_folder(folder)
    assert HEAD not in opened.tensors and opened.described.model.tie_embeddings
    assert opened.precision == "fp32"


def test_a_folder_that_is_a_file_is_none(folder: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: Not a directory"):
        open_folder(folder / "config.json")
