"""A backend whose library is missing, or of the wrong kind, is refused before anything is built."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from helpers.runs import run_config

from megatron_ee.device import Device
from megatron_ee.errors import FieldError
from megatron_ee.training.build import build_trainer
from megatron_ee.training.optimizers import BACKENDS, check_backend
from megatron_ee.training.optimizers.requirements import INSTALL_APEX, INSTALL_TRANSFORMER_ENGINE

CPU = Device(torch.device("cpu"), "gloo", False, "")
GPU = Device(torch.device("cuda", 0), "nccl", False, "")
GPU_WITH_ENGINE = Device(torch.device("cuda", 0), "nccl", True, "")


def _refusal(backend: str, device: Device) -> str:
    with pytest.raises(FieldError) as caught:
        check_backend(backend, device)
    assert caught.value.field == "optimizer.backend"
    return str(caught.value)


def _install_apex(folder: Path, *, parts: tuple[str, ...], extensions: dict[str, str]) -> None:
    for part in ("", *parts):
        (folder / "apex" / part).mkdir(parents=True, exist_ok=True)
        (folder / "apex" / part / "__init__.py").touch()
    for name, text in extensions.items():
        (folder / f"{name}.py").write_text(text)


NVIDIA = ("optimizers", "normalization")
EXTENSIONS = {"amp_C": "", "fused_layer_norm_cuda": ""}
BROKEN = {**EXTENSIONS, "amp_C": "raise ImportError('undefined symbol')"}


@pytest.mark.parametrize(
    ("parts", "extensions", "message"),
    [
        (None, {}, "NVIDIA's Apex is not installed"),
        (("views",), {}, "the apex that is installed is not NVIDIA's"),
        (NVIDIA, {}, "lacks the CUDA extensions"),
        (NVIDIA, BROKEN, "lacks the CUDA extensions"),
        (NVIDIA, EXTENSIONS, None),
    ],
    ids=["absent", "wrong package", "no extensions", "extensions of another torch", "ok"],
)
def test_what_apex_is_there_decides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: tuple[str, ...] | None,
    extensions: dict[str, str],
    message: str | None,
) -> None:
    if parts is not None:
        _install_apex(tmp_path, parts=parts, extensions=extensions)
    monkeypatch.syspath_prepend(tmp_path)
    for name in EXTENSIONS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    if message is None:
        check_backend("apex", GPU)
        return
    said = _refusal("apex", GPU)
    assert message in said
    assert said.endswith(INSTALL_APEX)


def test_transformer_engine_says_how_to_install_it() -> None:
    assert _refusal("transformer_engine", GPU).endswith(INSTALL_TRANSFORMER_ENGINE)
    check_backend("transformer_engine", GPU_WITH_ENGINE)


@pytest.mark.parametrize("backend", ["apex", "transformer_engine"])
def test_kernels_for_gpus_are_refused_on_cpus(backend: str) -> None:
    assert _refusal(backend, CPU) == (
        f"optimizer.backend: {backend}: it has kernels for GPUs alone, and this run is on CPUs; take torch"
    )


def test_a_missing_deepspeed_is_said_before_process_groups_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def find_all_but_deepspeed(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "deepspeed" else find_spec(name, package)

    monkeypatch.setattr("megatron_ee.training.optimizers.requirements.find_spec", find_all_but_deepspeed)
    monkeypatch.setattr("megatron_ee.training.build.open_mesh", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(FieldError, match=r"DeepSpeed is not installed: pip install 'megatron-ee\[deepspeed\]'"):
        build_trainer(run_config(tmp_path, optimizer={"backend": "deepspeed"}), CPU)


@pytest.mark.parametrize("backend", ["megatron", "torch", "deepspeed"])
def test_what_is_there_is_taken(backend: str) -> None:
    assert backend in BACKENDS
    check_backend(backend, CPU)
