"""Three steps of every backend are those of torch's AdamW on an independent model in one process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.optimizer_steps import NUM_STEPS, assert_near, backend_steps, reference_steps, steps_config
from helpers.ranks import RankPool
from helpers.shards import whole
from helpers.tiny import VOCAB_SIZE

from megatron_ee.checkpoint.sharded import model_state
from megatron_ee.config import Config
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.assemble import build_stage
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers import BACKENDS, OptimizerBackend

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "PP2xDP2": (4, {"pipeline": 2, "data": 2}),
    "TP2": (2, {"tensor": 2, "sequence": True}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "megatron": {},
    "torch": {},
    "deepspeed": {},
    "deepspeed, offload": {"deepspeed": {"offload": "cpu"}},
}
CASES = [(layout, backend) for layout in LAYOUTS for backend in SETTINGS]
# Of the others, those of PP2xDP2 run below in every test run, with a step that is left out.
QUICK = [("PP2xDP2", "megatron"), ("TP2", "deepspeed, offload")]


class FusedAdam(torch.optim.Optimizer):
    """What Apex and Transformer Engine have by this name, by the formula: one step for a group, no master weights."""

    def __init__(self, params: Any, lr: float = 1e-3, adam_w_mode: bool = False) -> None:
        assert adam_w_mode, "or the decay goes through the moments"
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for tensor in group["params"]:
                assert tensor.dtype == tensor.grad.dtype == torch.float32
                state = self.state[tensor]
                if not state:
                    state.update(exp_avg=torch.zeros_like(tensor), exp_avg_sq=torch.zeros_like(tensor))
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.lerp_(tensor.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(tensor.grad, tensor.grad, value=1 - beta2)
                unbiased = (second / (1 - beta2**step)).sqrt() + group["eps"]
                tensor.mul_(1 - group["lr"] * group["weight_decay"])
                tensor.addcdiv_(first / (1 - beta1**step), unbiased, value=-group["lr"])


@contextmanager
def stub_libraries() -> Iterator[None]:
    """Modules in place of Apex and Transformer Engine."""
    names = ["apex", "apex.optimizers", "transformer_engine", "transformer_engine.pytorch"]
    names.append("transformer_engine.pytorch.optimizers")
    assert not set(names) & sys.modules.keys()
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _with_stubs(config: Config) -> Any:
    with stub_libraries():
        return backend_steps(config)


def _poisoned(config: Config) -> Any:
    return backend_steps(config, poisoned=1)


def _first_stage_frozen(config: Config) -> Any:
    return backend_steps(config, frozen_stage=0)


def _check(config: Config, results: list[Any]) -> None:
    expected, norms = reference_steps(config, whole(before for before, _, _ in results))
    assert_near(whole(after for _, after, _ in results), expected)
    assert min(norms) > config.optimizer.clip_grad_norm, "clipping is active"
    for _, _, own in results:
        assert own == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "backend"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_three_steps_are_those_of_torch_in_one_process(ranks: RankPool, layout: str, backend: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = steps_config(backend.split(",")[0], parallel, optimizer=SETTINGS[backend])
    _check(config, ranks.run(world_size, backend_steps, config))


@pytest.mark.parametrize("backend", ["apex", pytest.param("transformer_engine", marks=pytest.mark.slow)])
def test_fused_libraries_step_alike(ranks: RankPool, backend: str) -> None:
    world_size, parallel = LAYOUTS["PP2xDP2"]
    config = steps_config(backend, parallel)
    _check(config, ranks.run(world_size, _with_stubs, config))


def _open(backend: str, mesh: Mesh) -> tuple[Stage, OptimizerBackend]:
    config = steps_config(backend, {})
    stage = build_stage(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, mesh)
    gradients = StageGradients(stage, mesh, config.parallel)
    return stage, BACKENDS[backend](stage, config.optimizer, mesh, gradients)


def _step(stage: Stage, optimizer: OptimizerBackend, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in stage.parameters():
        parameter.main_grad.normal_(generator=generator)
    optimizer.step(1e-2)


def _move(mesh: Mesh, source: tuple[Stage, OptimizerBackend], target: tuple[Stage, OptimizerBackend]) -> None:
    """Parameters, and the optimizer's state as a checkpoint has it."""
    target[0].load_state_dict(source[0].state_dict())
    state = source[1].sharded_state_dict(model_state(source[0], mesh))
    tensors = {
        name: {kind: entry.data.clone() for kind, entry in kinds.items()} for name, kinds in state["tensors"].items()
    }
    target[1].load_state_dict({**state, "tensors": tensors})


@pytest.mark.parametrize("backend", ["apex", "transformer_engine"])
def test_fused_libraries_take_over_from_torch_and_back(mesh: Mesh, backend: str) -> None:
    """They count steps for all parameters together, torch for each by itself."""
    with stub_libraries():
        whole_run, first, second, third = (_open(name, mesh) for name in ("torch", "torch", backend, "torch"))
        for number in range(6):
            _step(*whole_run, number)
        previous = None
        for part, numbers in ((first, (0, 1)), (second, (2, 3)), (third, (4, 5))):
            if previous is not None:
                _move(mesh, previous, part)
            for number in numbers:
                _step(*part, number)
            previous = part
    for own, expected in zip(third[0].parameters(), whole_run[0].parameters(), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", ["zero-bubble", pytest.param("megatron", marks=pytest.mark.slow)])
def test_deepspeed_goes_with_other_schedules(ranks: RankPool, schedule: str) -> None:
    config = steps_config("deepspeed", {"pipeline": 2, "data": 2, "schedule": schedule})
    _check(config, ranks.run(4, backend_steps, config))


def test_deepspeed_keeps_all_kinds_of_copies_equal(ranks: RankPool) -> None:
    """The embedding is also every exit's projection, and there is one norm; `whole` compares the stages' copies."""
    tied = {"model": {"tie_embeddings": True}, "exits": {"norm": "shared"}}
    config = steps_config("deepspeed", {"pipeline": 2, "data": 2}, **tied)
    results = ranks.run(4, backend_steps, config)
    _check(config, results)
    assert all({"embedding.weight", "norm.weight"} <= after.keys() for _, after, _ in results)


def test_deepspeed_on_stages_with_unequal_groups(ranks: RankPool) -> None:
    """All that the first stage trains is without decay, and not all that the second does."""
    patterns = ["embedding.*", "output.*", "layers.[1-4].*"]
    parallel = {"pipeline": 2, "data": 2, "layout": [{"layers": 4}, {"layers": 4}]}
    config = steps_config("deepspeed", parallel, optimizer={"no_weight_decay": patterns})
    _check(config, ranks.run(4, backend_steps, config))


@pytest.mark.parametrize("backend", [name for name in SETTINGS if name != "megatron"])
def test_gradients_that_are_no_numbers_change_nothing_anywhere(ranks: RankPool, backend: str) -> None:
    """One rank has one. All skip the step, which leaves no trace in moments and counts."""
    world_size, parallel = LAYOUTS["PP2xDP2"]
    config = steps_config(backend.split(",")[0], parallel, optimizer=SETTINGS[backend])
    results = ranks.run(world_size, _poisoned, config)
    expected, norms = reference_steps(config, whole(before for before, _, _ in results), left_out=1)
    assert_near(whole(after for _, after, _ in results), expected)
    for _, _, own in results:
        assert own[1] is None
        assert [norm for norm in own if norm is not None] == pytest.approx(norms, rel=1e-6)


def test_a_stage_may_have_nothing_to_train(ranks: RankPool) -> None:
    results = {}
    for backend in ("torch", "deepspeed"):
        config = steps_config(backend, {"pipeline": 2, "data": 2}, exits={"projection": "own"})
        results[backend] = ranks.run(4, _first_stage_frozen, config)
    (_, _, norms), *_ = results["torch"]
    assert len(norms) == NUM_STEPS and all(norms)
    assert_near(*(whole(after for _, after, _ in of_backend) for of_backend in results.values()))
    assert all(own == pytest.approx(norms, rel=1e-6) for _, _, own in results["deepspeed"])
