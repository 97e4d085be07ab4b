"""Which parameters decay."""

from pathlib import Path

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, write_small_dataset

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer


def _decays(config: Config) -> dict[str, float]:
    """Weight decay of each parameter, as the optimizer applied it in a step."""
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    trainer.train(until=1)
    names = {id(parameter): name for name, parameter in trainer.stage.named_parameters()}
    groups = trainer.optimizer._optimizer.param_groups  # type: ignore[attr-defined]
    return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize(
    ("patterns", "without"), [([], ()), (["embedding.*", "layers.3.*"], ("embedding.", "layers.3."))], ids=str
)
def test_norms_biases_and_what_patterns_name_have_no_decay(
    tmp_path: Path, ranks: RankPool, patterns: list[str], without: tuple[str, ...]
) -> None:
    write_small_dataset(tmp_path)
    vectors = {"vocab_size": "auto", "qkv_bias": True, "qk_norm": True}
    optimizer = {"weight_decay": 0.25, "no_weight_decay": patterns}
    config = run_config(tmp_path, optimizer=optimizer, model=vectors)
    (decays,) = ranks.run(1, _decays, config)
    assert len(decays) == 1 + 8 * 9 + 3 + 1, "every parameter is in a group"
    for name, decay in decays.items():
        is_vector = "norm" in name or name.endswith(".bias")
        assert decay == (0.0 if is_vector or name.startswith(without) else 0.25), name
