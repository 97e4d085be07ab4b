"""Decoding by gates: they decide instead of the logits, and an exit that does not fire projects nothing."""

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.decoding import full_logits, opened, request, texts_of, tokens_of
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee.config import ExitParams
from megatron_ee.errors import UserError
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.runner import Runner
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

EXITS = [2, 5]
HEADS: dict[str, Any] = {"norms": "norm", "MLP and block": ["mlp", "block"], "block and MLP": ["block", "mlp"]}


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    head = HEADS[request.param]
    return opened(whole_model(mesh, exits=EXITS, head=head, gate=["linear", "mlp"], temperature=[0.5, 2.0]))


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _gate_confidences(stage: Stage, tokens: list[int], layer: int) -> torch.Tensor:
    """[S], from one pass without a cache."""
    positions = torch.arange(len(tokens))
    _, taps = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, layer)
    return stage.gate_logits(taps[stage.tap_of(layer)], layer).sigmoid().flatten()


def _middle(confidences: torch.Tensor) -> float:
    """Between two confidences, far from both."""
    ascending = confidences.sort().values
    widest = 8 + int(ascending.diff()[8:-8].argmax())
    return float(ascending[widest : widest + 2].mean())


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Rows of which an exit made logits, by its layer."""
    counts: Counter[int] = Counter()
    project = Runner.project

    def counting(self: Runner, features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        counts[layer] += len(features_NH)
        return project(self, features_NH, layer)

    monkeypatch.setattr(Runner, "project", counting)
    return counts


def test_gates_decide_and_only_exits_that_fire_project(model: OpenedModel, projected: Counter[int]) -> None:
    thresholds = {layer: _middle(_gate_confidences(model.stage, _tokens(40), layer)) for layer in EXITS}
    params = ExitParams(measure="gate", thresholds=thresholds)
    requests = [request(_tokens(4, seed), params, max_new_tokens=20) for seed in range(3)]
    texts = texts_of(model, requests)
    used = Counter(emission.exit_layer for text in texts for emission in text)
    assert set(used) == {2, 5, 8}, "the case is to mix depths"
    assert projected == used, "one projection a token"
    for of, text in zip(requests, texts, strict=True):
        tokens = [*of.prompt, *tokens_of(text)]
        confidences = {layer: _gate_confidences(model.stage, tokens, layer)[3:-1].tolist() for layer in EXITS}
        logits = {layer: full_logits(model.stage, tokens, layer)[3:-1] for layer in (*EXITS, 8)}
        for number, emission in enumerate(text):
            fired = next((layer for layer in EXITS if confidences[layer][number] >= thresholds[layer]), 8)
            assert emission.exit_layer == fired
            assert emission.token == int(logits[fired][number].argmax())
            wanted = 1.0 if fired == 8 else confidences[fired][number]
            assert emission.confidence == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("threshold", "expected"), [(0.999, {2: 40, 5: 40, 8: 40}), (0.0, {2: 40})])
def test_by_probability_every_exit_on_the_way_projects_once(
    model: OpenedModel, projected: Counter[int], threshold: float, expected: dict[int, int]
) -> None:
    texts_of(model, [request(_tokens(4, seed), ExitParams(threshold=threshold), max_new_tokens=20) for seed in (0, 1)])
    assert projected == expected


def _depths(model: OpenedModel, params: ExitParams) -> set[int]:
    (text,) = texts_of(model, [request([1, 2, 3], params, max_new_tokens=8)])
    return {emission.exit_layer for emission in text}


def test_thresholds_hold_for_gates(model: OpenedModel) -> None:
    assert _depths(model, ExitParams(measure="gate", threshold=0.0)) == {2}
    assert _depths(model, ExitParams(measure="gate", threshold=1.0)) == {8}
    assert _depths(model, ExitParams(measure="gate", threshold=0.0, exits=(5,))) == {5}


def test_a_model_without_gates_refuses_by_name(mesh: Mesh) -> None:
    bare = opened(whole_model(mesh, exits=EXITS))
    half = opened(whole_model(mesh, exits=EXITS, gate=["none", "linear"]))
    said = r"inference.exit.measure: gate, but the model has no gate after layers \[2, 5\], none at all \(exits.gate\)"
    with pytest.raises(UserError, match=said):
        _depths(bare, ExitParams(measure="gate"))
    with pytest.raises(UserError, match=r"no gate after layers \[2\], only after \[5\]"):
        _depths(half, ExitParams(measure="gate"))
    assert _depths(half, ExitParams(measure="gate", threshold=0.0, exits=(5,))) == {5}
    assert _depths(bare, ExitParams(measure="gate", mode="full")) == {8}, "nobody is asked"


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
