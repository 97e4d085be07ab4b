"""Hugging Face -> ours -> Hugging Face: the same tensors, the same config, exits beside it; nothing half-written."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.disks import small_disk
from helpers.huggingface import ARCHITECTURES, assert_same, save_model, tensors_of
from helpers.saved import save_random_run
from helpers.tokenizers import write_bpe_folder

from megatron_ee.checkpoint import from_huggingface, streaming, to_huggingface
from megatron_ee.checkpoint.description import read_description
from megatron_ee.checkpoint.from_huggingface import import_model
from megatron_ee.checkpoint.to_huggingface import export_model
from megatron_ee.checkpoint.unsharded import StepReader
from megatron_ee.errors import UserError
from megatron_ee.inference.loading import open_checkpoint_tokenizer
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

ALL_KINDS = {
    "layers": [2, 4, 5, 6],
    "head": ["norm", "mlp", "block", "norm"],
    "projection": ["shared", "shared", "own", "own"],
    "temperature": [1.0, 2.0, 1.5, 1.0],
    "gate": ["linear", "none", "mlp", "none"],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama with a tokenizer, in two files or more."""
    folder = save_model(tmp_path / "source", "Llama", shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    write_bpe_folder(folder, eos_token="<|endoftext|>", model_max_length=77)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_imported_is_exported_as_it_was(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    source = save_model(tmp_path / "source", architecture, dtype=dtype)
    write_bpe_folder(source, eos_token="<|endoftext|>", model_max_length=77)
    import_model(source, tmp_path / "run")
    exported = export_model(tmp_path / "run", tmp_path / "again")
    assert exported.architecture == f"{architecture}ForCausalLM"
    assert_same(tensors_of(tmp_path / "again"), tensors_of(source))
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((source / "config.json").read_text())
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in source.iterdir()}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same(loaded.state_dict(), transformers.AutoModelForCausalLM.from_pretrained(source).state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_several_files_and_small_pieces_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(to_huggingface, "_PIECE_BYTES", 900)
    source = save_model(tmp_path / "source", "Qwen2", shard_size="50KB", tie_word_embeddings=tied)
    import_model(source, tmp_path / "run", tokenizer="bytes")
    assert read_description(tmp_path / "run/checkpoints/step_00000000").model.tie_embeddings is tied
    export_model(tmp_path / "run", tmp_path / "again", shard_size=30_000)
    assert_same(tensors_of(tmp_path / "again"), tensors_of(source))
    assert ("lm_head.weight" in tensors_of(source)) is not tied
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "again").glob("*.safetensors")}
    assert len(sizes) > 3 and sorted(size for size in sizes.values() if size > 42_000) == []
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == sizes.keys()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same(loaded.state_dict(), transformers.AutoModelForCausalLM.from_pretrained(source).state_dict())


def test_a_source_without_a_tokenizer_needs_one_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "Llama")
    with pytest.raises(UserError, match=r"source: holds no tokenizer: name one with --tokenizer"):
        import_model(source, tmp_path / "run")
    with pytest.raises(UserError, match="--tokenizer: 'gone' is neither 'bytes' nor"):
        import_model(source, tmp_path / "run", tokenizer="gone")
    imported = import_model(source, tmp_path / "run", tokenizer=str(write_bpe_folder(tmp_path / "named")))
    assert (imported.folder / "tokenizer.json").exists()
    description = read_description(imported.folder)
    assert open_checkpoint_tokenizer(imported.folder, description).name == imported.tokenizer == description.tokenizer
    small = save_model(tmp_path / "small", "Llama", vocab_size=256)
    with pytest.raises(UserError, match=r"small: its embedding has 256 rows, and its tokenizer 258 tokens"):
        import_model(small, tmp_path / "another", tokenizer="bytes")


def _parameters(run: Path) -> dict[str, torch.Tensor]:
    (step,) = (run / "checkpoints").glob("step_*")
    reader = StepReader(step)
    return {name: reader.read(name) for name in reader.shapes}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exits_lie_beside_the_model_and_come_back(tmp_path: Path, mesh: Mesh, precision: str) -> None:
    config, _ = save_random_run(tmp_path / "run", mesh, precision, **ALL_KINDS)
    exported = export_model(tmp_path / "run", tmp_path / "theirs")
    assert exported.exits == (2, 4, 5, 6)
    content = json.loads((tmp_path / "theirs/exits.json").read_text())
    assert content["layers"] == [2, 4, 5, 6] and content["heads"] == ALL_KINDS["head"]
    assert content["checkpoint_hash"] == read_description(exported.step).hash
    names = tensors_of(tmp_path / "theirs", "exits.safetensors").keys()
    assert names == {name for name in _parameters(tmp_path / "run") if name.startswith("exits.")}
    imported = import_model(tmp_path / "theirs", tmp_path / "again", tokenizer="bytes")
    assert_same(_parameters(tmp_path / "again"), _parameters(tmp_path / "run"))
    description = read_description(imported.folder)
    assert description.precision == precision and not description.has_optimizer
    for layer in config.exits.layers:
        for of in ("head_of", "projection_of", "temperature_of", "gate_of"):
            assert getattr(description.exits, of)(layer) == getattr(config.exits, of)(layer)


def test_a_model_without_a_config_of_theirs_says_which_tokens_end_it(tmp_path: Path, mesh: Mesh) -> None:
    save_random_run(tmp_path / "run", mesh, layers=[])
    exported = export_model(tmp_path / "run", tmp_path / "theirs")
    assert exported.architecture == "LlamaForCausalLM" and exported.exits == ()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "theirs")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 256, 257)
    assert not list((tmp_path / "theirs").glob("exits*"))


def _logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens_BS).logits.transpose(0, 1)


def _exit_logits(stage: Stage, layer: int, tokens_BS: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens_BS.shape[1])
    _, taps = stage.run_layers(stage.embed(tokens_BS), positions, 0, layer)
    return stage.exit_logits(taps[stage.tap_of(layer)], layer, positions)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tie_embeddings": True},
        {"qk_norm": True, "sliding_window": 3, "sliding_window_layers": [1, 5, 7]},
        {"qkv_bias": True, "sliding_window": 3, "sliding_window_layers": [7]},
    ],
    ids=["plain", "tied", "windows", "window beyond"],
)
@pytest.mark.parametrize("layer", [2, 4, 5, 6])
def test_the_model_that_ends_at_an_exit_is_a_stock_model(
    tmp_path: Path, mesh: Mesh, layer: int, model: dict[str, Any]
) -> None:
    tied = "tie_embeddings" in model
    _, stage = save_random_run(tmp_path / "run", mesh, model=model, **ALL_KINDS)
    exported = export_model(tmp_path / "run", tmp_path / "theirs", exit_layer=layer)
    assert exported.exits == () and not list((tmp_path / "theirs").glob("exits*"))
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["num_hidden_layers"] == (6 if layer == 5 else layer), "a block is a layer more"
    assert config["tie_word_embeddings"] is (tied and layer not in (5, 6))
    tokens_BS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = _exit_logits(stage, layer, tokens_BS)
    torch.testing.assert_close(_logits(tmp_path / "theirs", tokens_BS), expected, rtol=1e-5, atol=1e-5)


def test_what_can_not_be_exported_is_refused(tmp_path: Path, mesh: Mesh) -> None:
    save_random_run(tmp_path / "run", mesh, layers=[2])
    with pytest.raises(UserError, match="--exit: there is no exit after layer 3; exits: 2"):
        export_model(tmp_path / "run", tmp_path / "theirs", exit_layer=3)
    with pytest.raises(UserError, match="is neither a run with a whole checkpoint nor a step folder"):
        export_model(tmp_path, tmp_path / "theirs")
    (shard, *_) = (tmp_path / "run/checkpoints/step_00000007").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"is damaged: {shard.name} is not what was saved"):
        export_model(tmp_path / "run", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_destination_that_exists_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists; give a folder that does not"):
        import_model(source, tmp_path / "there")
    import_model(source, tmp_path / "run")
    with pytest.raises(UserError, match="there exists; give a folder that does not"):
        export_model(tmp_path / "run", tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())
    with pytest.raises(UserError, match=r"no name! cannot be a run: .*name"):
        import_model(source, tmp_path / "no name!")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there", "run"}


def test_a_full_disk_is_said_in_one_line_and_keeps_nothing(tmp_path: Path, source: Path) -> None:
    import_model(source, tmp_path / "run")
    with small_disk(tmp_path, megabytes=0.1) as disk:
        for convert in (
            lambda: import_model(source, disk.path / "run"),
            lambda: export_model(tmp_path / "run", disk.path / "theirs"),
        ):
            with pytest.raises(UserError) as raised:
                convert()
            assert str(raised.value).endswith("cannot be written: No space left on device")
            assert str(disk.path) in str(raised.value)
            assert not list(disk.path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")], ids=["Ctrl-C", "a bad disk"])
def test_what_is_interrupted_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*_args: Any) -> None:
        raise error

    expected = KeyboardInterrupt if error is KeyboardInterrupt else UserError
    import_model(source, tmp_path / "run")
    monkeypatch.setattr(streaming, "write_description", fail)
    with pytest.raises(expected):
        import_model(source, tmp_path / "another")
    monkeypatch.setattr(to_huggingface, "write_small", fail)
    with pytest.raises(expected):
        export_model(tmp_path / "run", tmp_path / "theirs")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run"}


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = from_huggingface.open_folder

    def open_and_cut(path: Path) -> Any:
        folder = opened(path)
        (shard, *_) = path.glob("model-00002-*")
        shard.write_bytes(shard.read_bytes()[:-100])
        return folder

    monkeypatch.setattr(from_huggingface, "open_folder", open_and_cut)
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors: ends within model\.layers\."):
        import_model(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupt_stops_all_threads(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, calls = streaming.BackgroundWriting.wait, itertools.count()

    def interrupt_first(*args: Any) -> bool:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return wait(*args)

    monkeypatch.setattr(streaming.BackgroundWriting, "wait", interrupt_first)
    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    shutil.rmtree(source)
