"""The decoding part of the GPU bench: what vLLM is given is the model that we decode, and how it is asked."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.ranks import RankPool

from megatron_ee.config import ParallelConfig
from megatron_ee.device import choose_device
from megatron_ee.parallel.mesh import open_mesh

TOOLS = Path(__file__).parents[2] / "tools"
VLLM = """
import pathlib, time

class SamplingParams:
    def __init__(self, **fields):
        self.fields = fields

class LLM:
    def __init__(self, model, max_model_len, **fields):
        assert (pathlib.Path(model) / "config.json").is_file() and max_model_len == 5
        print("loading")

    def generate(self, prompts, sampling, use_tqdm):
        assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
        assert sampling.fields["max_tokens"] == 3 and sampling.fields["ignore_eos"]
        print("generating")
        time.sleep(0.01)
"""


def _tool(name: str) -> Any:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


def _written(folder: Path) -> list[list[int]]:
    """Tokens of our full depth, of the model that is written to the folder."""
    bench, decoding = _tool("bench_gpu"), _tool("bench_gpu_decoding")
    mesh = open_mesh(ParallelConfig(), choose_device("cpu"))
    config = bench.config_of(bench.SMALL, bench.SMALL.exits)
    config = config.model_copy(update={"training": config.training.model_copy(update={"precision": "fp32"})})
    trainer = bench.build(config, mesh)
    decoding.write_huggingface(trainer, folder)
    model = decoding.open_for_decoding(trainer)
    return [model.full_depth_choices(prompt) for prompt in decoding.prompts(3)]


def test_what_is_compared_with_is_the_same_model(ranks: RankPool, tmp_path: Path) -> None:
    (ours,) = ranks.run(1, _written, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for tokens, choices in zip(_tool("bench_gpu_decoding").prompts(3), ours, strict=True):
            logits_SV = model(torch.tensor([tokens])).logits[0, :, :256]  # of bytes: beyond the tokenizer's is padding
            assert choices == logits_SV.argmax(-1).tolist()


def test_vllm_is_asked_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(VLLM)
    (tmp_path / "vllm-9.9.dist-info").mkdir()
    (tmp_path / "vllm-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench = _tool("bench_gpu_vllm")
    assert bench.is_vllm_installed()
    with bench.VllmChild(tmp_path, [[1, 2], [3]], 3) as child:
        assert child.version == "9.9"
        assert all(child.seconds() >= 0.01 for _ in range(2))
    assert child.returncode == 0
    with pytest.raises(RuntimeError, match="vLLM ended with status 1"), bench.VllmChild(tmp_path, [[7]], 3) as child:
        child.seconds()
