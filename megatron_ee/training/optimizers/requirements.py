"""Whether a backend's library is there, asked before anything is built, so that no rank waits for one that gave up."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from megatron_ee.device import Device
from megatron_ee.environment import ApexState, probe_apex
from megatron_ee.errors import FieldError

INSTALL_DEEPSPEED = "pip install 'megatron-ee[deepspeed]'"
INSTALL_APEX = (
    "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./apex"
)
INSTALL_TRANSFORMER_ENGINE = "pip install --no-build-isolation 'transformer-engine[pytorch]'"

_APEX: Mapping[ApexState, str] = {
    "absent": "NVIDIA's Apex is not installed",
    "wrong package": "the apex that is installed is not NVIDIA's, but the web toolkit of that name on PyPI; remove it",
    "no CUDA extensions": "the Apex that is installed lacks the CUDA extensions of this torch, without which it has no "
    "fused kernels",
}


def check_backend(backend: str, device: Device) -> None:
    """Every rank calls it before process groups are opened.

    Raises:
        FieldError: names `optimizer.backend`, and says how to install what is missing.
    """
    if problem := _PROBLEMS.get(backend, _nothing)(device):
        raise FieldError("optimizer.backend", f"{backend}: {problem}")


def _nothing(device: Device) -> str:
    return ""


def _deepspeed_problem(device: Device) -> str:
    return "" if find_spec("deepspeed") else f"DeepSpeed is not installed: {INSTALL_DEEPSPEED}"


def _apex_problem(device: Device) -> str:
    if problem := _cpu_problem(device):
        return problem
    state = probe_apex()
    return "" if state == "ok" else f"{_APEX[state]}: {INSTALL_APEX}"


def _transformer_engine_problem(device: Device) -> str:
    if problem := _cpu_problem(device):
        return problem
    # broken, it is refused when the device is chosen
    return "" if device.has_transformer_engine else f"it is not installed: {INSTALL_TRANSFORMER_ENGINE}"


def _cpu_problem(device: Device) -> str:
    return "" if device.torch.type == "cuda" else "it has kernels for GPUs alone, and this run is on CPUs; take torch"


_PROBLEMS: Mapping[str, Callable[[Device], str]] = {
    "deepspeed": _deepspeed_problem,
    "apex": _apex_problem,
    "transformer_engine": _transformer_engine_problem,
}
