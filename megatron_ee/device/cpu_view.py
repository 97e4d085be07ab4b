"""megatron-core on the CPU: its modules see torch through a view in which "cuda" means the CPU.

With device `cpu`, every import of torch by a module under `megatron.` yields the view; all other modules keep the real
torch. Replaced, for megatron alone, and why:
  torch.cuda.{current_device, device_count, set_device, synchronize, empty_cache}   placement and waiting
  torch.cuda.{get_rng_state, manual_seed, default_generators, random, _lazy_call}   its random-number tracker
  torch.{zeros, ones, empty, full, tensor, arange}                                  device="cuda" is the CPU
  torch.compile                   identity: it decorates fusions for GPUs, whose compiler takes two seconds to import
  Tensor.cuda, Tensor.type        identity; and the "torch.cuda." prefix that its optimizers look for
`Tensor` is one class for everybody, so its two methods look at their caller: outside megatron they are the originals.
Megatron's own import of wandb finds nothing: it is for engines that we do not use, and takes another second.
"""

import builtins
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def install_cpu_view() -> None:
    """Make every later import of megatron-core run on the CPU; RuntimeError where it is imported already."""
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if any(name.startswith("megatron.") for name in list(sys.modules)):  # other threads may import
        raise RuntimeError("megatron.core was imported before the device was chosen; choose the device first")
    sys.meta_path.insert(0, _MegatronFinder())
    _for_megatron_only("cuda", lambda original, tensor, *args, **kwargs: tensor)
    _for_megatron_only("type", _cuda_type)


class _View(ModuleType):
    """A module that answers for some names and forwards all others."""

    def __init__(self, module: ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _MegatronFinder(MetaPathFinder):
    """Finds megatron's modules as usual, and gives each an `__import__` that yields the views."""

    def __init__(self) -> None:
        def state(device: Any = None) -> torch.Tensor:
            return torch.get_rng_state()

        waiting = dict.fromkeys(("set_device", "synchronize", "empty_cache"), lambda *args, **kwargs: None)
        cpu = torch.device("cpu")
        place = {"current_device": lambda: cpu, "device_count": lambda: 1}
        random = {"get_rng_state": state, "manual_seed": torch.manual_seed, "_lazy_call": lambda call, **kwargs: call()}
        generators = {
            "default_generators": {cpu: torch.default_generator},
            "random": SimpleNamespace(get_rng_state=state),
        }
        cuda = _View(torch.cuda, {**waiting, **place, **random, **generators})
        factories = ("zeros", "ones", "empty", "full", "tensor", "arange")
        on_cpu = {name: partial(_create_on_cpu, getattr(torch, name)) for name in factories}
        self.views = {torch: _View(torch, {"cuda": cuda, "compile": _leave_as_it_is, **on_cpu}), torch.cuda: cuda}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith("megatron.") else None
        if spec is not None and spec.loader is not None:  # a namespace package has none
            spec.loader.exec_module = partial(self._execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        def import_(*args: Any, **kwargs: Any) -> Any:
            if args[0] == "wandb":
                raise ImportError("megatron-core has its own ways with wandb, which are not used")
            found = builtins.__import__(*args, **kwargs)
            return self.views.get(found, found)

        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
        execute(module)


def _create_on_cpu(factory: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    if str(kwargs.get("device")).startswith("cuda"):
        kwargs["device"] = "cpu"
    return factory(*args, **kwargs)


def _leave_as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """As `torch.compile` is called: with a function, or with options alone, for a decorator."""
    return _leave_as_it_is if function is None else function


def _for_megatron_only(method: str, replacement: Callable[..., Any]) -> None:
    original = getattr(torch.Tensor, method)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return replacement(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(torch.Tensor, method, dispatch)


def _cuda_type(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    answer = original(*args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer
