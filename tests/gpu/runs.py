"""Runs whose first step is compared between devices, precisions and layouts."""

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_config

from megatron_ee.config import Config

Figures = dict[str, float]


def first_step_config(folder: Path, **changes: Any) -> Config:
    """A tiny run whose exits count from its first step on."""
    return run_config(folder, **{"exits": {"weight_schedule": {"shape": "constant"}}, **changes})


def assert_same_first_step(actual: Figures, expected: Figures, *, loss: float, norm: float) -> None:
    """Every exit's loss and the gradient's norm, within relative tolerances."""
    names = {name for name in expected if name.startswith("train/exit_") and name.endswith("/loss")}
    assert len(names) == 3, "two exits and the final one"
    for name in names:
        assert actual[name] == pytest.approx(expected[name], rel=loss), name
    assert actual["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=norm)
