"""What DeepSpeed's ZeRO is given, what it keeps, and that it leaves the process alone."""

import gc
import logging
import signal
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.optimizer_steps import steps_config
from helpers.ranks import RankPool
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.parallel.estimate import estimate
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.training.assemble import build_stage
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.optimizers.deepspeed_zero import ZeroAdamW

PP2_DP2 = {"pipeline": 2, "data": 2}


def _open(config: Config, mesh: Mesh) -> tuple[StageGradients, ZeroAdamW]:
    stage = build_stage(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, mesh)
    gradients = StageGradients(stage, mesh, config.parallel)
    gradients.zero()
    return gradients, ZeroAdamW(stage, config.optimizer, mesh, gradients)


def _reduced(config: Config) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A rank's gradients of what stages share, and one of those that they do not, from ones times its number."""
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    gradients, _ = _open(config, mesh)
    stage = gradients.ddp.module
    for parameter in stage.parameters():
        parameter.main_grad.fill_(mesh.rank + 1)
    gradients.reduce()
    shared = {name: copy.main_grad.clone() for name, copy in stage.shared_parameters.items()}
    own = next(iter(stage.layers.parameters())).main_grad.clone()
    return shared, own


def test_it_makes_the_sums_over_data_ranks_itself(ranks: RankPool) -> None:
    """All but those of what stages share: these have one summand, or copies would part with three data ranks."""
    results = ranks.run(4, _reduced, steps_config("deepspeed", PP2_DP2))
    for rank, (shared, own) in enumerate(results):
        assert torch.equal(own, torch.full_like(own, rank + 1))
        expected = (1 + 2 + 3 + 4) if rank in (0, 2) else 0  # the first data rank of each stage
        assert torch.equal(shared["output"], torch.full_like(shared["output"], expected))


def _bytes_of_state(config: Config) -> int:
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    _, optimizer = _open(config, mesh)
    optimizer.step(1e-3)
    zero = optimizer._zero
    state = [value for values in zero.optimizer.state.values() for value in values.values()]
    return sum(tensor.nbytes for tensor in (*zero.single_partition_of_fp32_groups, *state))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_each_data_rank_keeps_the_share_that_is_estimated(ranks: RankPool, precision: str) -> None:
    config = steps_config("deepspeed", PP2_DP2, training={"precision": precision})
    stages = estimate(config, 4, VOCAB_SIZE).stages
    measured = ranks.run(4, _bytes_of_state, config)
    for rank, held in enumerate(measured):
        assert held == pytest.approx(stages[rank // 2].optimizer, abs=256), "but for steps and padding"


def _is_freed(config: Config) -> bool:
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    gradients, optimizer = _open(config, mesh)
    optimizer.step(1e-3)
    stage = weakref.ref(gradients.ddp.module)
    del gradients, optimizer
    gc.collect()
    return stage() is None


def test_a_model_is_freed_with_its_optimizer(ranks: RankPool) -> None:
    assert ranks.run(2, _is_freed, steps_config("deepspeed", {"pipeline": 2})) == [True, True]


def test_it_is_quiet_and_leaves_the_process_as_it_was(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [*map(signal.getsignal, signals), logging.root.manager.disable, logging.root.level, dist.group.WORLD]
    _, optimizer = _open(steps_config("deepspeed", {}), mesh)
    assert optimizer.step(1e-3) == 0.0
    assert tuple(capfd.readouterr()) == ("", "")
    after = [*map(signal.getsignal, signals), logging.root.manager.disable, logging.root.level, dist.group.WORLD]
    assert before == after
    assert not list(tmp_path.iterdir()), "nothing was compiled"
