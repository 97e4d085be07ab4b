"""Decoding by gates: they decide instead of the logits, and an exit that does not fire projects nothing."""

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee.config import ExitParams
from megatron_ee.errors import UserError
from megatron_ee.inference.decoder import Decoder
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.policies import GATE, MEASURES, max_probability
from megatron_ee.inference.request import Request
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.tokenizer import ByteTokenizer

EXITS = [2, 5]
HEADS: dict[str, Any] = {"norms": "norm", "MLP and block": ["mlp", "block"], "block and MLP": ["block", "mlp"]}


class _TinyTokenizer(ByteTokenizer):
    vocab_size = VOCAB_SIZE


@pytest.fixture(scope="module", params=HEADS)
def stage(request: pytest.FixtureRequest, mesh: Mesh) -> Stage:
    return whole_model(mesh, exits=EXITS, head=HEADS[request.param], gate=["linear", "mlp"], temperature=[0.5, 2.0])


def _tokens(count: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def _by_full_forward(stage: Stage, tokens: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences [S] of the gate and logits [S, V] of an exit, from one pass without a cache."""
    positions = torch.arange(len(tokens))
    _, taps = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, layer)
    hidden_SBH = taps[stage.tap_of(layer)]
    logits_SV = stage.exit_logits(hidden_SBH, layer, positions).flatten(0, 1)
    return stage.gate_logits(hidden_SBH, layer).sigmoid().flatten(), logits_SV


def _middle(confidences: torch.Tensor) -> float:
    """Between two confidences, far from both."""
    ascending = confidences.sort().values
    widest = 8 + int(ascending.diff()[8:-8].argmax())
    return float(ascending[widest : widest + 2].mean())


def test_gates_decide_and_only_exits_that_fire_project(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = _tokens(40)
    expected = {layer: _by_full_forward(stage, tokens, layer) for layer in EXITS}
    full_SV = _by_full_forward_of_final(stage, tokens)
    thresholds = {layer: _middle(expected[layer][0]) for layer in EXITS}
    projected: Counter[int] = Counter()
    project = Stage.project

    def counting(self: Stage, features_SBH: torch.Tensor, layer: int) -> torch.Tensor:
        projected[layer] += 1
        return project(self, features_SBH, layer)

    monkeypatch.setattr(Stage, "project", counting)
    decoder = Decoder(stage, thresholds, GATE, max_pending=1000, capacity=64)
    used: Counter[int] = Counter()
    for position, token in enumerate(tokens):
        outcome = decoder.feed([token])
        used[outcome.exit_layer] += 1
        fired = next((layer for layer in EXITS if expected[layer][0][position] >= thresholds[layer]), 8)
        assert outcome.exit_layer == fired
        wanted_V = full_SV[position] if fired == 8 else expected[fired][1][position]
        torch.testing.assert_close(outcome.logits_V, wanted_V, atol=1e-5, rtol=0)
        if fired < 8:
            assert outcome.confidence == pytest.approx(float(expected[fired][0][position]), abs=1e-5)
    assert set(used) == {2, 5, 8}, "the case is to mix depths"
    assert projected == used, "one projection a token"
    projected.clear()
    decoder = Decoder(stage, {2: 0.999, 5: 0.999}, max_probability, max_pending=1000, capacity=64)
    for token in tokens:
        decoder.feed([token])
    assert projected == {2: 40, 5: 40, 8: 40}, "by probability every exit on the way projects"


@torch.no_grad()
def _by_full_forward_of_final(stage: Stage, tokens: list[int]) -> torch.Tensor:
    positions = torch.arange(len(tokens))
    y_SBH, _ = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, 8)
    return stage.exit_logits(y_SBH, 8, positions).flatten(0, 1)


def _generate(stage: Stage, params: ExitParams) -> list[int]:
    engine = Engine(stage, _TinyTokenizer(), EXITS, MEASURES)
    request = Request(prompt=(1, 2, 3), max_new_tokens=8, stop=VOCAB_SIZE, exit=params)
    return [emission.exit_layer for emission in engine.generate(request)]


def test_an_engine_asks_gates(stage: Stage) -> None:
    assert set(_generate(stage, ExitParams(measure="gate", threshold=0.0))) == {2}
    assert set(_generate(stage, ExitParams(measure="gate", threshold=1.0))) == {8}
    assert set(_generate(stage, ExitParams(measure="gate", threshold=0.0, exits=(5,)))) == {5}


def test_a_model_without_gates_refuses_by_name(mesh: Mesh) -> None:
    bare, half = whole_model(mesh, exits=EXITS), whole_model(mesh, exits=EXITS, gate=["none", "linear"])
    said = r"inference.exit.measure: gate, but the model has no gate after layers \[2, 5\], none at all \(exits.gate\)"
    with pytest.raises(UserError, match=said):
        _generate(bare, ExitParams(measure="gate"))
    with pytest.raises(UserError, match=r"no gate after layers \[2\], only after \[5\]"):
        _generate(half, ExitParams(measure="gate"))
    assert set(_generate(half, ExitParams(measure="gate", threshold=0.0, exits=(5,)))) == {5}
    assert set(_generate(bare, ExitParams(measure="gate", mode="full"))) == {8}, "nobody is asked"


def test_a_config_that_asks_gates_that_it_does_not_have_is_refused() -> None:
    ask = {"exit": {"measure": "gate"}}
    with pytest.raises(ValueError, match=r"gate, but exits.gate is none for the exits after layers \[2, 5\]"):
        tiny_config(**_with_inference({}, ask))
    with pytest.raises(ValueError, match=r"after layers \[5\]"):
        tiny_config(**_with_inference({"gate": ["mlp", "none"]}, ask))
    for exit_params in ({"exits": [2]}, {"thresholds": {5: 1.0}}, {"mode": "full"}):
        tiny_config(**_with_inference({"gate": ["mlp", "none"]}, {"exit": {"measure": "gate", **exit_params}}))


def _with_inference(exits: dict[str, Any], inference: dict[str, Any]) -> dict[str, Any]:
    from megatron_ee.config import InferenceConfig

    return {"exits": exits, "inference": InferenceConfig.model_validate(inference)}
