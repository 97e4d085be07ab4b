"""Training that begins with a Hugging Face model: exits tuned onto it, and what is exported afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.huggingface import assert_same, rewrite_config, save_model, tensors_of
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from megatron.core import dist_checkpointing

from megatron_ee.checkpoint.folders import find_checkpoint
from megatron_ee.checkpoint.from_huggingface import import_model
from megatron_ee.checkpoint.merge import merge_exits
from megatron_ee.checkpoint.to_huggingface import export_model
from megatron_ee.checkpoint.unsharded import StepReader
from megatron_ee.config import Config, load_config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.parallel.mesh import Mesh

PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a dataset, and a Llama that was imported: runs/llama of `source`."""
    folder = tmp_path_factory.mktemp("huggingface")
    write_small_dataset(folder)
    source = save_model(folder / "source", "Llama", dtype=torch.bfloat16, **PLAIN)
    rewrite_config(source, of_its_own="kept")
    import_model(source, folder / "runs/llama", tokenizer="bytes")
    return folder


def _config(folder: Path, name: str, **changes: Any) -> Config:
    model = load_config(folder / "runs/llama/config.yaml").model.model_dump()
    training = {"train_iters": 3, "precision": "bf16", **changes.pop("training", {})}
    checkpoint = {"initial": str(folder / "runs/llama")}
    config = run_config(folder, name=name, model=model, training=training, checkpoint=checkpoint, **changes)
    assert config.model.rope_theta == 5e5
    return config


def _merge(tuned: Path, destination: Path) -> None:
    merge_exits(tuned, destination, choose_device("cpu"))


def test_exits_are_tuned_onto_a_model_whose_tensors_stay_what_they_were(folder: Path, ranks: RankPool) -> None:
    runs = folder / "runs"
    exits = {"layers": [1, 2], "head": ["norm", "mlp"], "projection": ["own", "shared"]}
    ranks.run(1, train, _config(folder, "tuned", exits=exits, training={"trains": "exits"}))
    with pytest.raises(UserError, match=r"holds exits alone; tools/merge_exits\.py makes a model of it"):
        export_model(runs / "tuned", folder / "nothing")
    assert not (folder / "nothing").exists()
    ranks.run(1, _merge, runs / "tuned", runs / "merged")
    exported = export_model(runs / "merged", folder / "exported")
    assert exported.exits == (1, 2)
    assert_same(tensors_of(folder / "exported"), tensors_of(folder / "source"))
    assert _content(folder / "exported") == _content(folder / "source")
    tuned = tensors_of(folder / "exported", "exits.safetensors")
    assert not torch.equal(tuned["exits.1.output.weight"], tensors_of(folder / "source")["lm_head.weight"])
    import_model(folder / "exported", runs / "again", tokenizer="bytes")
    export_model(runs / "again", folder / "once-more")
    assert_same(tensors_of(folder / "once-more", "*.safetensors"), tensors_of(folder / "exported", "*.safetensors"))


def test_what_came_with_a_model_stays_with_it_through_training(folder: Path, ranks: RankPool, mesh: Mesh) -> None:
    config = _config(folder, "trained", exits={"layers": [2]}, parallel={"tensor": 2, "pipeline": 2})
    ranks.run(4, _train_one, config)
    ranks.run(4, train, config)
    step = find_checkpoint(folder / "runs/trained")
    assert step.name == "step_00000003"
    _check_reader(step)
    exported = export_model(step, folder / "trained")
    assert exported.architecture == "LlamaForCausalLM" and _content(folder / "trained") == _content(folder / "source")
    before, after = tensors_of(folder / "source"), tensors_of(folder / "trained")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.3.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"])
    with pytest.raises(UserError, match="exists; give a folder that does not"):
        export_model(step, folder / "trained")


def _train_one(config: Config) -> None:
    train(config, until=1, save=True)


def _check_reader(step: Path) -> None:
    """What is read row by row of matrices that were split both ways is what megatron-core reads."""
    reader, expected = StepReader(step), dist_checkpointing.load_plain_tensors(str(step))
    names = [name for name in reader.shapes if not name.startswith("optimizer.")]
    assert "layers.4.self_attention.linear_proj.weight" in names and "layers.1.mlp.linear_fc1.weight" in names
    for name in names:
        assert torch.equal(reader.read(name), expected[name]), name
        stop = max(2, reader.shapes[name][0] - 1)
        assert torch.equal(reader.read(name, 1, stop), expected[name][1:stop]), name


def _content(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_shared_exits_serve_assistant_early_exit_without_a_file_of_ours(folder: Path, ranks: RankPool) -> None:
    """LayerSkip's exits are the model itself, run less deep."""
    exits = {"layers": [2, 5], "norm": "shared", "weight_schedule": {"shape": "constant"}}
    config = run_config(folder, name="shared", exits=exits, training={"train_iters": 3})
    ranks.run(1, train, config)
    exported = export_model(folder / "runs/shared", folder / "shared")
    assert exported.exits == (2, 5) and tensors_of(folder / "shared", "exits.safetensors") == {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "shared")
    prompt = torch.tensor([list(b"early exits let")])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, **options)
    for layer in config.exits.layers:
        assert torch.equal(model.generate(prompt, assistant_early_exit=layer, **options), expected)
