"""Choosing a device, and the view of torch that megatron-core gets on the CPU."""

import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_ee import device
from megatron_ee.device import DeviceError, choose_device


def _fake_gpus(monkeypatch: pytest.MonkeyPatch, *, gpus: int, ranks: int, local_rank: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


@pytest.mark.parametrize(
    ("choice", "gpus", "ranks", "kind"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 1, "cuda"),
        ("auto", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("cpu", 2, 2, "cpu"),
        ("cuda", 2, 2, "cuda"),
    ],
)
def test_auto_takes_cuda_only_with_a_gpu_for_every_rank(
    monkeypatch: pytest.MonkeyPatch, choice: str, gpus: int, ranks: int, kind: str
) -> None:
    _fake_gpus(monkeypatch, gpus=gpus, ranks=ranks, local_rank=ranks - 1)
    device = choose_device(choice)  # type: ignore[arg-type]
    assert device.torch == torch.device(kind, ranks - 1 if kind == "cuda" else None)
    assert device.backend == {"cpu": "gloo", "cuda": "nccl"}[kind]
    assert f"{gpus} GPU" in device.reason and kind.upper() in device.reason


def test_more_ranks_than_gpus_is_an_error_under_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_gpus(monkeypatch, gpus=1, ranks=2)
    with pytest.raises(DeviceError, match="device: cuda needs a GPU for every local rank; found 2 local ranks, 1 GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("gpus", [0, *(pytest.param(gpus, marks=pytest.mark.slow) for gpus in (1, 2))])
def test_view_is_inert_with_device_cuda(gpus: int) -> None:
    """In a fresh process: with CUDA chosen nothing is replaced, and without GPUs choosing CUDA is refused; so is
    a choice that comes after megatron-core."""
    printed = _fresh_process(f"""
        import sys, torch
        torch.cuda.is_available = lambda: {gpus} > 0
        torch.cuda.device_count = lambda: {gpus}
        torch.cuda.set_device = lambda index: None
        before = (list(sys.meta_path), torch.Tensor.type, torch.Tensor.cuda)
        from megatron_ee.device import DeviceError, choose_device
        try:
            print(choose_device("cuda").backend)
        except DeviceError:
            print("refused")
        assert before == (list(sys.meta_path), torch.Tensor.type, torch.Tensor.cuda)
        from megatron.core.tensor_parallel import layers
        assert layers.torch is torch
        try:
            choose_device("cpu")
        except RuntimeError as error:
            assert "before the device was chosen" in str(error)
        else:
            print("chosen too late")
    """)
    assert printed == ("nccl" if gpus else "refused")


def test_torch_outside_megatron_is_unchanged() -> None:
    """In a fresh process: the same answers and errors from torch before and after, and megatron's own view beside."""
    printed = _fresh_process("""
        import sys, torch
        def answers():
            probes = {
                "type": lambda: torch.zeros(1).type(),
                "half": lambda: torch.zeros(1).type(torch.float16).dtype,
                "cuda": lambda: torch.zeros(1).cuda(),
                "zeros": lambda: torch.zeros(1, device="cuda"),
                "count": lambda: torch.cuda.device_count(),
                "current": lambda: torch.cuda.current_device(),
                "module": lambda: id(torch.cuda),
                "compile": lambda: id(torch.compile),
            }
            seen = {}
            for name, probe in probes.items():
                try:
                    seen[name] = str(probe())
                except Exception as error:
                    seen[name] = type(error).__name__
            return seen
        before = answers()
        from megatron_ee.device import choose_device
        choose_device("cpu")
        from megatron.core.optimizer import clip_grads
        from megatron.core.tensor_parallel import layers, random
        assert answers() == before, (before, answers())
        assert layers.torch is not torch and layers.torch.nn is torch.nn
        assert str(layers.torch.zeros(1, device="cuda").device) == "cpu"
        assert layers.torch.cuda.device_count() == 1
        assert eval("torch.zeros(1).cuda().type()", vars(clip_grads)) == "torch.cuda.FloatTensor"
        assert random._lazy_call(lambda: 7) == 7
        assert layers.torch.compile(answers) is layers.torch.compile(dynamic=True)(answers) is answers
        assert not {"torch._inductor", "wandb"} & sys.modules.keys(), "what takes longest to import"
        compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
        assert compiled(torch.ones(1)).item() == 3.0, "torch._dynamo breaks where torch.cuda is another for everybody"
        print("unchanged")
    """)
    assert printed == "unchanged"


def _fresh_process(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_broken_transformer_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.11: cannot open shared object file")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(DeviceError, match=r"^device: Transformer Engine is installed, .*: libcudart\.so\.11"):
        device._has_transformer_engine()
