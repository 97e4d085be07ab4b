"""What a run writes down about its surroundings: all that is there, nothing that is secret, and never an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ee import environment
from megatron_ee.environment import describe_environment, probe_apex

EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")


def _write_modules(folder: Path, *names: str, text: str = "") -> None:
    for name in names:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules are found first, and forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in EXTENSIONS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_apex_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    assert probe_apex() == "absent"


def test_another_package_of_that_name_is_not_apex(folder: Path) -> None:
    _write_modules(folder, "apex/__init__", "apex/views", text="raise RuntimeError('imported')")
    assert probe_apex() == "wrong package"


def test_a_lone_module_of_that_name_is_not_apex(folder: Path) -> None:
    _write_modules(folder, "apex")
    assert probe_apex() == "wrong package"


@pytest.mark.parametrize("built", [(), EXTENSIONS[:1], EXTENSIONS[1:]])
def test_apex_without_its_extensions(folder: Path, built: tuple[str, ...]) -> None:
    _write_modules(folder, "apex/__init__", "apex/optimizers/__init__", "apex/normalization/__init__", *built)
    assert probe_apex() == "no CUDA extensions"


def test_extensions_that_cannot_be_loaded_are_none(folder: Path) -> None:
    _write_modules(folder, "apex/__init__", "apex/optimizers/__init__", "apex/normalization/__init__")
    _write_modules(folder, *EXTENSIONS, text="raise ImportError('undefined symbol')")
    assert probe_apex() == "no CUDA extensions"


def test_apex_with_its_extensions(folder: Path) -> None:
    _write_modules(folder, "apex/__init__", "apex/optimizers/__init__", "apex/normalization/__init__", *EXTENSIONS)
    assert probe_apex() == "ok"
    for name in EXTENSIONS:
        del sys.modules[name]


def test_the_description_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "LIBRARIES", ("torch", "no-such-library"))
    found = describe_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"]
    assert found["packages"]["no-such-library"] is None


def test_without_torch_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = describe_environment()
    assert (found["cuda"], found["gpus"]) == (None, [])


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ("SLURM_JOB_ID", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "RANK", "TORCHELASTIC_RUN_ID")
    secret = ("SLURM_JWT", "NCCL_API_KEY", "TORCH_token", "MASTER_PASSWORD", "SLURM_SECRET", "CUDA_CREDENTIALS")
    for name in (*kept, *secret, "WANDB_API_KEY", "SOMETHING_ELSE"):
        monkeypatch.setenv(name, "a value")
    variables = describe_environment()["variables"]
    assert variables.keys() >= set(kept)
    assert not variables.keys() & {*secret, "WANDB_API_KEY", "SOMETHING_ELSE"}


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_and_whether_it_has_changes(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("")
    assert environment._describe_checkout(file) is None, "outside git"
    _git(tmp_path, "init")
    assert environment._describe_checkout(file) is None, "a file that the checkout does not know"
    _git(tmp_path, "add", "module.py")
    assert environment._describe_checkout(file) is None, "no commit yet"
    _git(tmp_path, "commit", "-m", "one")
    found = environment._describe_checkout(file)
    assert found is not None
    assert len(found["commit"]) == 40
    assert not found["has_changes"]
    file.write_text("changed")
    assert environment._describe_checkout(file) == {**found, "has_changes": True}


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment()["git"] is None


def test_the_report_has_an_aligned_line_for_each_library() -> None:
    packages = {"torch": "2.8.0", "apex": "0.9", "transformer-engine": None}
    found = {"python": "3.11.2", "packages": packages, "apex": "wrong package", "cuda": None, "gpus": []}
    assert environment._report(found).splitlines() == [
        "python              3.11.2",
        "torch               2.8.0",
        "apex                0.9: wrong package",
        "transformer-engine  not found",
        "CUDA                not found",
        "GPUs                none",
    ]
