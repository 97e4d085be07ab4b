"""What a process runs on: libraries, GPUs, the commit and the launcher's variables. To see it:

python -m megatron_ee.environment
"""

import importlib
import os
import platform
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

__all__ = ["ApexState", "describe_environment", "probe_apex"]

ApexState = Literal["absent", "wrong package", "no CUDA extensions", "ok"]

LIBRARIES = ("torch", "megatron-core", "transformer-engine", "apex", "deepspeed", "transformers", "wandb", "numpy")

# What decides how ranks find each other and how libraries behave: only names that begin so are written down.
VARIABLES = (
    *("SLURM_", "NCCL_", "GLOO_", "CUDA_", "NVTE_", "OMP_", "TORCH", "PYTORCH_", "MASTER_"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NNODES", "NPROC_PER_NODE"),
)

# Of those, names that hold one of these words are left out: SLURM_JWT, for one, lets its owner act as the user.
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL", "JWT", "AUTH")


def describe_environment() -> dict[str, Any]:
    """All that can be found out about this process's surroundings, as JSON takes it; null is what is not there.

    It asks CUDA for the GPUs' names: where that matters, choose the device first.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in LIBRARIES},
        "apex": probe_apex(),
        **_describe_cuda(),
        "git": _describe_checkout(Path(__file__)),
        "variables": _variables(),
    }


def probe_apex() -> ApexState:
    """Which Apex this is, if any: only with its CUDA extensions does NVIDIA's have fused kernels.

    That `import apex` works decides nothing: the apex of the Python Package Index is a toolkit for web sites, and
    NVIDIA's also installs without its extensions.
    """
    spec = find_spec("apex")
    if spec is None:
        return "absent"
    # Looked for in its folder, not imported: the wrong package may do anything, or fail.
    folders = spec.submodule_search_locations or []
    if not all(PathFinder.find_spec(f"apex.{name}", list(folders)) for name in ("optimizers", "normalization")):
        return "wrong package"
    extensions = ("amp_C", "fused_layer_norm_cuda")
    if not all(find_spec(name) for name in extensions):
        return "no CUDA extensions"
    # They are linked against torch's libraries, which have to be loaded first. Built for another torch, they fail.
    return "ok" if all(_import(name) for name in ("torch", *extensions)) else "no CUDA extensions"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # absent, or a library of it is
        return None


def _describe_cuda() -> dict[str, Any]:
    torch = _import("torch")
    if torch is None:
        return {"cuda": None, "gpus": []}
    try:
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError):  # a driver that does not fit
        gpus = []
    return {"cuda": torch.version.cuda, "gpus": gpus}


def _describe_checkout(file: Path) -> dict[str, Any] | None:
    """The commit of the checkout that a file belongs to, and whether anything there differs from it."""
    # An installed package may lie inside somebody else's checkout, which says nothing about it.
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file, "rev-parse", "HEAD")
    changes = _git(file, "status", "--porcelain")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "has_changes": bool(changes)}


def _git(file: Path, *arguments: str) -> str | None:
    """What git prints in the file's folder; None where there is no git, no checkout, or no answer."""
    # Inside a hook, variables of git's own point to the hook's checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", *arguments]
    try:
        answer = subprocess.run(
            command, cwd=file.parent, env=environment, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and not any(word in name.upper() for word in SECRETS)
    }


def _report(found: dict[str, Any]) -> str:
    packages = {name: version or "not found" for name, version in found["packages"].items()}
    apex = found["apex"]
    if apex != "absent":
        packages["apex"] = f"{found['packages']['apex'] or 'unknown version'}: {apex}"
    gpus = ", ".join(found["gpus"]) or "none"
    lines = {"python": found["python"], **packages, "CUDA": found["cuda"] or "not found", "GPUs": gpus}
    width = max(map(len, lines))
    return "".join(f"{name:{width}}  {text}\n" for name, text in lines.items())


if __name__ == "__main__":
    sys.stdout.write(_report(describe_environment()))
