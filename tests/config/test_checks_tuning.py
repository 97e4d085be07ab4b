"""What training exits alone needs and excludes, each said with the field's name."""

from typing import Any

import pytest
from helpers.tiny import tiny_config
from pydantic import ValidationError

TUNING: dict[str, Any] = {
    "training": {"trains": "exits"},
    "checkpoint": {"initial": "runs/base"},
    "exits": {"layers": [2, 5]},
}


def _with(**changes: Any) -> dict[str, Any]:
    return {**TUNING, **changes}


def _pinned(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"parallel": {"pipeline": len(stages), "layout": list(stages)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {}}, "training.trains: exits needs checkpoint.initial"),
        ({"exits": {"layers": []}}, "training.trains: exits needs an exit to train"),
        ({"parallel": {"pipeline": 2, "schedule": "zero-bubble"}}, "parallel.schedule: zero-bubble orders backwards"),
        ({"parallel": {"pipeline": 2, "schedule": "filled-1f1b"}}, "parallel.schedule: filled-1f1b orders backwards"),
        ({"parallel": {"pipeline": 2, "schedule": "megatron"}}, "parallel.schedule: megatron orders backwards"),
        (
            {"parallel": {"pipeline": 2, "schedule": "interleaved", "chunks": 2}},
            "parallel.schedule: interleaved orders",
        ),
        ({"training": {"trains": "exits", "recompute": "full"}}, "training.recompute: full saves what layers keep"),
        ({"exits": {"layers": [2, 5], "release": True}}, "exits.release: true waits for the layers' backward"),
        ({"exits": {"layers": [2], "distillation": {}}}, "exits.distillation: needs the final exit, which"),
        (
            {"exits": {"layers": [2], "gate": "linear", "gate_loss": {"target": "final"}}},
            "exits.gate_loss.target: needs the final exit, which",
        ),
        (
            {"exits": {"layers": [2], "layerskip": {}, "weight_schedule": {}}},
            "exits.layerskip: weighs the final exit too",
        ),
        (
            {"exits": {"layers": [2, 5], "norm": "shared", "gate": ["linear", "none"]}},
            "exits, but those after layers [5] have no norm, projection or gate of their own",
        ),
        ({"training": {"trains": "exits", "layer_dropout": {"maximum": 0.1}}}, "training.layer_dropout: skips layers"),
        ({"parallel": {"pipeline": 6}}, "6 stages need at least 6 layers, not 5 up to the last exit"),
        (_pinned({"layers": 2}, {"layers": 6}), "add up to 8, not to the last exit = 5"),
        (_pinned({"layers": 0}, {"layers": 5}), "parallel.layout.0.layers: 0 is for the last stages"),
        (_pinned({"layers": 5}, {"layers": 0, "exits_at_start": True}), "parallel.layout.1.exits_at_start: true on a"),
        (_pinned({"layers": 2}, {"layers": 3, "exits_at_end": False}), "exits_at_end: false leaves exit 5 to nobody"),
        (_pinned({"layers": 2, "exits_at_end": False}, {"layers": 3}), "is given to neither"),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        tiny_config(**_with(**changes))
    assert message in str(raised.value)


def test_a_stage_without_layers_is_for_exits_alone() -> None:
    with pytest.raises(ValidationError, match=r"parallel.layout.1.layers: 0 is for training.trains: exits"):
        tiny_config(**_pinned({"layers": 8}, {"layers": 0}))


def test_depth_and_exits_of_training() -> None:
    tuning = tiny_config(**TUNING)
    assert (tuning.depth, tuning.trained_exits) == (5, (2, 5))
    training = tiny_config()
    assert (training.depth, training.trained_exits) == (8, (2, 5, 8))
