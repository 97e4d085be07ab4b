"""Runs that begin with a Hugging Face folder, as it lies there: what they start from is what transformers computes."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.huggingface import save_model
from helpers.ranks import RankPool
from helpers.runs import Records, refusal, run_config, train, write_small_dataset
from helpers.shards import Pieces, pieces_of, whole
from helpers.tokenizers import write_bpe_folder
from safetensors.torch import load_file, save_file

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.checkpoint.from_huggingface import import_model
from megatron_ee.checkpoint.merge import merge_exits
from megatron_ee.checkpoint.models import read_model
from megatron_ee.checkpoint.to_huggingface import export_model
from megatron_ee.config import Config, load_config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.huggingface.folder import Folder
from megatron_ee.training.build import build_trainer

FIELDS = {"vocab_size": 260, "eos_token_id": 256, "bos_token_id": 256}
CONSTANT = {"weight_schedule": {"shape": "constant"}}
EXITS = {"layers": [1, 3], "head": ["norm", "mlp"], "projection": ["shared", "own"], **CONSTANT}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a dataset of bytes and a Llama for them, in several files: llama/."""
    folder = tmp_path_factory.mktemp("huggingface")
    write_small_dataset(folder)
    save_model(folder / "llama", "Llama", shard_size="40KB", **FIELDS)
    return folder


def _config(folder: Path, name: str, *, model: str = "llama", **changes: Any) -> Config:
    checkpoint = {"initial": str(folder / model), **changes.pop("checkpoint", {})}
    fields = {"model": read_model(folder / model).model_dump(), "exits": {"layers": []}, **changes}
    return run_config(folder, name=name, checkpoint=checkpoint, **fields)


def _begin(config: Config) -> dict[str, Any]:
    """The parameters that a run begins with, its first batch, what was said, and how much was read of what."""
    lines: list[str] = []
    read: dict[str, int] = {}
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ee").addHandler(handler)
    original = Folder.read_parameter

    def counting(self: Folder, name: str, rows: slice | None = None) -> torch.Tensor:
        part = original(self, name, rows)
        read[name] = read.get(name, 0) + part.shape[0]
        return part

    Folder.read_parameter = counting  # type: ignore[method-assign]
    try:
        trainer = build_trainer(config, choose_device("cpu"))
    finally:
        Folder.read_parameter = original  # type: ignore[method-assign]
        logging.getLogger("megatron_ee").removeHandler(handler)
    pieces = pieces_of(trainer.stage, lambda parameter: parameter)
    return {"pieces": pieces, "lines": lines, "read": read}


def _first_loss(config: Config) -> dict[str, Any]:
    """Of each exit in the first step, and the tokens, labels and mask of its batch, [sequences, positions]."""
    trainer = build_trainer(config, choose_device("cpu"))
    batch, records = trainer.loader.batch(0), Records()
    trainer.loggers = [records]
    trainer.train(1)
    parts = (batch.tokens_MBS, batch.labels_MBS, batch.mask_MBS)
    return {"figures": records.figures[1], "batch": [part.flatten(0, 1).numpy() for part in parts]}


def _expected(path: Path) -> Arrays:
    """Our parameters of a model of transformers', by reshaping alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    config, theirs = model.config, {name: value.float().numpy() for name, value in model.state_dict().items()}
    groups, ours = config.num_key_value_heads, {"embedding.weight": theirs["model.embed_tokens.weight"]}
    for layer in range(config.num_hidden_layers):
        of, to = f"model.layers.{layer}.", f"layers.{layer + 1}."
        parts = [theirs[f"{of}self_attn.{kind}_proj.weight"].reshape(groups, -1, config.hidden_size) for kind in "qkv"]
        ours[f"{to}self_attention.linear_qkv.weight"] = np.concatenate(parts, 1).reshape(-1, config.hidden_size)
        ours[f"{to}self_attention.linear_proj.weight"] = theirs[f"{of}self_attn.o_proj.weight"]
        ours[f"{to}input_layernorm.weight"] = theirs[f"{of}input_layernorm.weight"]
        ours[f"{to}pre_mlp_layernorm.weight"] = theirs[f"{of}post_attention_layernorm.weight"]
        halves = [theirs[f"{of}mlp.{half}_proj.weight"] for half in ("gate", "up")]
        ours[f"{to}mlp.linear_fc1.weight"] = np.concatenate(halves)
        ours[f"{to}mlp.linear_fc2.weight"] = theirs[f"{of}mlp.down_proj.weight"]
    return ours | {"norm.weight": theirs["model.norm.weight"], "output.weight": theirs["lm_head.weight"]}


def _assert_equal(ours: Arrays, expected: Arrays) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_each_rank_reads_its_own_share_and_new_exits_are_copies(folder: Path, ranks: RankPool) -> None:
    parallel = {"pipeline": 2, "tensor": 2, "sequence": True}
    results = ranks.run(4, _begin, _config(folder, "split", exits=EXITS, parallel=parallel))
    begun, expected = whole(result["pieces"] for result in results), _expected(folder / "llama")
    expected |= {"exits.1.norm.weight": expected["norm.weight"], "exits.3.norm.weight": expected["norm.weight"]}
    expected["exits.3.output.weight"] = expected["output.weight"]
    for part in ("pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"):
        expected[f"exits.3.{part}.weight"] = expected[f"layers.3.{part}.weight"]
    assert begun.keys() == expected.keys()
    _assert_equal(begun, expected)
    for rank, result in enumerate(results):
        read: dict[str, int] = result["read"]
        held = {name for name in result["pieces"] if not name.startswith("exits.")}
        copied = {"norm.weight", "output.weight", *(name for name in read if name.startswith("layers.3."))}
        assert set(read) <= held | copied, f"rank {rank} reads other layers"
        halved = [name for name in read if name.startswith("layers.") and "_qkv" in name]
        assert halved
        assert all(read[name] == expected[name].shape[0] // 2 for name in halved)
    (line,) = (line for line in results[0]["lines"] if line.startswith("begins with "))
    assert line == f"begins with {folder / 'llama'}, exits 1, 3 as copies of the model's own parts"


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow, id="stages"),
        pytest.param({"tensor": 2}, id="tensor-parallel ranks"),
    ],
)
def test_the_first_loss_is_that_of_transformers_and_of_the_imported_model(
    folder: Path, ranks: RankPool, parallel: dict[str, Any]
) -> None:
    exits = {"layers": [2], "norm": "shared", **CONSTANT}
    name = f"first-{'-'.join(parallel)}"
    result = ranks.run(2, _first_loss, _config(folder, name, exits=exits, parallel=parallel))[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    cut = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", num_hidden_layers=2)
    for of, layer in ((model, 4), (cut, 2)):
        loss = _loss(of, result["batch"])
        assert result["figures"][f"train/exit_{layer}/loss"] == pytest.approx(loss, abs=1e-5)
    if not (folder / "runs/imported").exists():
        import_model(folder / "llama", folder / "runs/imported", tokenizer="bytes")
    imported = _config(folder, f"{name}-imported", model="runs/imported", exits=exits, parallel=parallel)
    of_imported = ranks.run(2, _first_loss, imported)[0]["figures"]
    for layer in (2, 4):
        assert of_imported[f"train/exit_{layer}/loss"] == result["figures"][f"train/exit_{layer}/loss"]


def _loss(model: Any, batch: list[np.ndarray]) -> float:
    """Mean cross-entropy of the whole batch."""
    tokens, labels, mask = map(torch.as_tensor, batch)
    with torch.no_grad():
        logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return float((losses * mask.flatten()).sum() / mask.sum())


def test_another_precision_is_said(folder: Path, ranks: RankPool) -> None:
    save_model(folder / "half", "Llama", dtype=torch.bfloat16, **FIELDS)
    ((begun),) = ranks.run(1, _begin, _config(folder, "widened", model="half"))
    _assert_equal(whole([begun["pieces"]]), _expected(folder / "half"))
    assert f"begins with {folder / 'half'}, its bf16 parameters as fp32" in begun["lines"]
    exits = {"layers": [2], **CONSTANT}
    tuning = _config(folder, "half-tuned", model="half", exits=exits, training={"trains": "exits"})
    assert "training.precision is bf16, not fp32" in ranks.run(1, refusal, tuning)[0]


def _tune_config(folder: Path, name: str, model: str = "llama", **changes: Any) -> Config:
    training = {"trains": "exits", "train_iters": 6}
    return _config(folder, name, model=model, exits=EXITS, training=training, optimizer={"lr": 3e-2}, **changes)


def _stop_at_three(config: Config) -> None:
    train(config, until=3, save=True)


def _merge(tuned: Path, destination: Path, initial: Path | None = None) -> str:
    """What it was refused for."""
    try:
        merge_exits(tuned, destination, choose_device("cpu"), initial=initial)
    except UserError as error:
        return str(error)
    return ""


def _parameters(config: Config) -> Pieces:
    return pieces_of(build_trainer(config, choose_device("cpu")).stage, lambda parameter: parameter)


def test_tuned_exits_are_resumed_and_merged_and_the_model_is_the_folders_bit_for_bit(
    folder: Path, ranks: RankPool
) -> None:
    parallel = {"pipeline": 2}
    uninterrupted = ranks.run(2, train, _tune_config(folder, "tuned", parallel=parallel))[0]
    stopped = _tune_config(folder, "stopped", parallel=parallel)
    ranks.run(2, _stop_at_three, stopped)
    resumed = ranks.run(2, train, stopped)[0]
    assert resumed["started_at"] == 3
    for name in ("train/exit_1/loss", "train/exit_3/loss"):
        of_both = [[run["figures"][step][name] for step in (4, 5, 6)] for run in (uninterrupted, resumed)]
        assert of_both[0] == of_both[1]
    for name, value in uninterrupted["parameters"].items():
        np.testing.assert_array_equal(resumed["parameters"][name], value, err_msg=name)
    assert ranks.run(1, _merge, folder / "runs/stopped", folder / "runs/merged") == [""]
    further = {"initial": str(folder / "runs/merged")}
    merged = whole(ranks.run(1, _parameters, _config(folder, "further", exits=EXITS, checkpoint=further)))
    expected = _expected(folder / "llama")
    _assert_equal(merged, expected)
    assert not np.array_equal(merged["exits.1.norm.weight"], expected["norm.weight"]), "it has learned"


def test_another_folder_than_a_run_began_with_is_refused(folder: Path, ranks: RankPool) -> None:
    ranks.run(1, _stop_at_three, _tune_config(folder, "faithful"))
    shutil.copytree(folder / "llama", folder / "other")
    (file, *_) = sorted((folder / "other").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file, metadata={"format": "pt"})
    (message,) = ranks.run(1, refusal, _tune_config(folder, "faithful", "other"))
    assert message.startswith(f"checkpoint.initial: {folder / 'other'} is not what the run began with, ")
    (message,) = ranks.run(1, _merge, folder / "runs/faithful", folder / "runs/unfaithful", folder / "other")
    assert "is not what the run began with" in message
    shutil.move(folder / "llama", folder / "moved")
    try:
        assert ranks.run(1, _merge, folder / "runs/faithful", folder / "runs/moved", folder / "moved") == [""]
    finally:
        shutil.move(folder / "moved", folder / "llama")


def _cut(path: Path) -> str:
    file = path / "model-00002-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    return "checkpoint.initial: {path}/model-00002-of-00005.safetensors: cut off: "


def _take_out(path: Path) -> str:
    (path / "model-00003-of-00005.safetensors").unlink()
    return "checkpoint.initial: {path}/model-00003-of-00005.safetensors: No such file"


def _take_out_a_tensor(path: Path) -> str:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return "checkpoint.initial: {path}: the tensor model.norm.weight is missing"


def _change_a_shape(path: Path) -> str:
    (path / "config.json").write_text((path / "config.json").read_text().replace('_size": 48', '_size": 64'))
    return (
        "checkpoint.initial: {path}/model-00002-of-00005.safetensors: model.layers.0.mlp.gate_proj.weight is [48, 32], "
        "not [64, 32]"
    )


@pytest.mark.parametrize("damage", [_cut, _take_out, _take_out_a_tensor, _change_a_shape])
def test_what_is_wrong_with_it_is_one_line_on_every_rank(folder: Path, ranks: RankPool, damage: Any) -> None:
    path = folder / f"damaged-{damage.__name__}"
    shutil.copytree(folder / "llama", path)
    expected = damage(path).format(path=path)
    config = _config(folder, "refused", checkpoint={"initial": str(path)}, parallel={"pipeline": 2})
    messages = ranks.run(2, refusal, config)
    assert messages[0] == messages[1]
    assert messages[0].startswith(expected)
    assert "\n" not in messages[0]
    assert not (folder / "runs/refused").exists()


def _refused_while_reading(config: Config, unreadable: str) -> str:
    """A file is lost between headers and bytes, and one rank alone needs it."""
    original = Folder.read_parameter

    def read(self: Folder, name: str, rows: slice | None = None) -> torch.Tensor:
        if name == unreadable:
            raise UserError(f"{name} cannot be read")
        return original(self, name, rows)

    Folder.read_parameter = read  # type: ignore[method-assign]
    try:
        return refusal(config)
    finally:
        Folder.read_parameter = original  # type: ignore[method-assign]


def test_no_rank_waits_for_one_that_cannot_read(folder: Path, ranks: RankPool) -> None:
    config = _config(folder, "unread", parallel={"pipeline": 2})
    messages = ranks.run(2, _refused_while_reading, config, "embedding.weight")
    assert messages == ["checkpoint.initial: embedding.weight cannot be read"] * 2


@pytest.mark.slow
def test_exits_that_lie_beside_the_model_come_with_it(folder: Path, ranks: RankPool) -> None:
    """Tuned on the folder, merged, and exported again: a folder whose exits are kept, trained on and added to."""
    ranks.run(1, _stop_at_three, _tune_config(folder, "first"))
    assert ranks.run(1, _merge, folder / "runs/first", folder / "runs/both") == [""]
    export_model(folder / "runs/both", folder / "exported")
    begun = ranks.run(1, _begin, _config(folder, "onwards", model="exported", exits=EXITS))[0]
    assert f"begins with {folder / 'exported'}, exits 1, 3 as trained" in begun["lines"]
    merged = newest_checkpoint(folder / "runs/both")
    again = ranks.run(
        1, _begin, _config(folder, "again", model="exported", exits=EXITS, checkpoint={"initial": str(merged)})
    )
    _assert_equal(whole([begun["pieces"]]), whole([again[0]["pieces"]]))
    exits = {"layers": [1, 2], "head": ["norm", "mlp"], **CONSTANT}
    more = _config(folder, "more", model="exported", exits=exits, training={"trains": "exits"})
    ranks.run(1, _stop_at_three, more)
    assert ranks.run(1, _merge, folder / "runs/more", folder / "runs/three") == [""]
    of_three = load_config(folder / "runs/three/config.yaml").exits
    assert (of_three.layers, of_three.head) == ((1, 2, 3), ("norm", "mlp", "mlp"))
    other = _config(folder, "o2", model="exported", exits={"layers": [3], **CONSTANT}, training={"trains": "exits"})
    assert "has an exit 3 (mlp head, own norm, own projection" in ranks.run(1, refusal, other)[0]
    (folder / "exported/exits.safetensors").unlink()
    (message,) = ranks.run(1, refusal, more.model_copy(update={"name": "o3"}))
    assert message.startswith(f"checkpoint.initial: {folder / 'exported'}/exits.safetensors: ")


def test_another_tokenizer_than_its_own_is_refused(folder: Path, ranks: RankPool) -> None:
    shutil.copytree(folder / "llama", folder / "speaking")
    write_bpe_folder(folder / "speaking", eos_token="!")
    (message,) = ranks.run(1, refusal, _config(folder, "mute", model="speaking"))
    assert message.startswith(f"checkpoint.initial: {folder / 'speaking'} has tokenizer hf-")
    assert message.endswith(", and data.tokenizer is bytes; name the folder there")


def test_a_model_of_another_shape_is_refused(folder: Path, ranks: RankPool) -> None:
    (message,) = ranks.run(1, refusal, run_config(folder, name="o", checkpoint={"initial": str(folder / "llama")}))
    assert "is of another model: model.num_layers is 4, not 8" in message


def test_a_folder_of_pickles_alone_is_refused(folder: Path, ranks: RankPool) -> None:
    pickled = folder / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "llama/config.json", pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    (message,) = ranks.run(1, refusal, _config(folder, "p", checkpoint={"initial": str(pickled)}))
    assert message.startswith(f"checkpoint.initial: {pickled}: pytorch_model.bin is a pickle")
