"""Which token leaves where, by every measure, in batches whose rows have different rules: as one pass without a cache
says of each row by itself."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.confidences import SaidAtExit, said_at_exits
from helpers.decoding import decode, opened, request, tokens_of
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import ExitParams
from megatron_ee.errors import UserError
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.measures import MEASURES
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.runner import Runner
from megatron_ee.parallel.mesh import Mesh

EXITS = [2, 4, 6]
LENGTHS = [5, 1, 9, 3]
RULES: dict[str, dict[str, Any]] = {
    **{measure: {"measure": measure} for measure in MEASURES},
    "not asked at the exit before": {"measure": "cosine", "exits": [6]},
    "two in a row": {"measure": "max_probability", "patience": 2},
    "three in a row": {"measure": "gate", "patience": 3},
}


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> OpenedModel:
    heads, gates = ["norm", "mlp", "block"], ["linear", "mlp", "linear"]
    stage = whole_model(mesh, exits=EXITS, dtype=torch.float64, head=heads, gate=gates, temperature=[0.5, 1.0, 2.0])
    return opened(stage)


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _thresholds(model: OpenedModel, measure: str, layers: list[int], share: float) -> dict[int, float]:
    """About this share of tokens leaves at each exit, and no confidence is so near that rounding decides."""
    said = said_at_exits(model.stage, _tokens(60, seed=9), EXITS)
    thresholds = {}
    for layer in layers:
        confidences = sorted(said[layer].confidence(measure, position) for position in range(60))
        near = int(60 * (1 - share))
        gaps = [(confidences[rank + 1] - confidences[rank], rank) for rank in range(near - 5, near + 5)]
        _, rank = max(gaps)
        thresholds[layer] = (confidences[rank] + confidences[rank + 1]) / 2
    return thresholds


def _params(model: OpenedModel, name: str) -> ExitParams:
    rule = RULES[name]
    share = 0.9 if "patience" in rule else 0.4  # few tokens are chosen twice in a row
    thresholds = _thresholds(model, rule["measure"], rule.get("exits", EXITS), share)
    return ExitParams.model_validate({**rule, "thresholds": thresholds})


def _leaves(said: Mapping[int, SaidAtExit], position: int, params: ExitParams) -> tuple[int, float]:
    """The rule, written out: the layer, and the confidence there."""
    chosen = []
    for layer in params.exits or EXITS:
        confidence = said[layer].confidence(params.measure, position)
        chosen.append(said[layer].choice(position))
        in_a_row = len(chosen) >= params.patience and len(set(chosen[-params.patience :])) == 1
        if in_a_row and confidence >= params.thresholds[layer]:
            return layer, confidence
    return 8, 1.0


def _assert_as_said(model: OpenedModel, of: Request, text: list[Emission]) -> None:
    said = said_at_exits(model.stage, [*of.prompt, *tokens_of(text)], EXITS)
    for number, emission in enumerate(text):
        position = len(of.prompt) + number - 1
        layer, confidence = _leaves(said, position, of.exit)
        assert emission.exit_layer == layer
        assert emission.confidence == pytest.approx(confidence, abs=1e-6 if of.exit.measure == "gate" else 1e-10)
        assert emission.token == said[layer].choice(position)


@pytest.mark.parametrize("name", RULES)
def test_rows_leave_where_their_own_confidence_says(model: OpenedModel, name: str) -> None:
    """EE-LLM asks the last row of a batch, and all leave where it does."""
    params = _params(model, name)
    requests = [request(_tokens(length, seed=length), params) for length in LENGTHS]
    texts = decode(Batch(model, slots=4, capacity=64), requests)
    for of, text in zip(requests, texts, strict=True):
        _assert_as_said(model, of, text)
    used = Counter(emission.exit_layer for text in texts for emission in text)
    assert len(used) > 1, f"the case is to mix depths: {used}"


def test_a_batch_of_all_rules(model: OpenedModel) -> None:
    """Each row by its own; and the text is that of the request alone."""
    params = [ExitParams(mode="full"), *(_params(model, name) for name in RULES)]
    requests = [request(_tokens(3 + number, seed=number), of) for number, of in enumerate(params)]
    together = decode(Batch(model, slots=len(requests), capacity=64), requests)
    for of, text in zip(requests, together, strict=True):
        if of.exit.mode != "full":
            _assert_as_said(model, of, text)
        (alone,) = decode(Batch(model, slots=1, capacity=64), [of])
        assert [(of.token, of.exit_layer) for of in alone] == [(of.token, of.exit_layer) for of in text]


@pytest.mark.parametrize("measure", MEASURES)
def test_the_borders_of_thresholds(model: OpenedModel, measure: str) -> None:
    def depths(**params: Any) -> set[int]:
        (text,) = decode(
            Batch(model, slots=1, capacity=64), [request([1, 2, 3], ExitParams(measure=measure, **params))]
        )
        return {emission.exit_layer for emission in text}

    assert depths(threshold=1.0) == depths(threshold=1) == depths(threshold=0.0, mode="full") == {8}
    assert depths(threshold=0.0) == depths(threshold=0) == {2}
    assert depths(thresholds={2: 1.0, 4: 0.0}) == depths(threshold=0.0, min_exit=3) == {4}
    assert depths(threshold=0.0, patience=4) == {8}, "there are three exits"


def test_a_confidence_that_is_no_number_fires_nowhere_and_is_counted(model: OpenedModel) -> None:
    """In its own row: the other one leaves."""

    def broken_in_the_first_row(asked: Any) -> torch.Tensor:
        values_N = MEASURES["max_probability"](asked)
        values_N[0] = torch.nan
        return values_N

    measures = {"broken": broken_in_the_first_row}
    batch = Batch(opened(model.stage, measures=measures), slots=2, capacity=64)
    params = ExitParams(measure="broken", threshold=0.0)
    texts = decode(batch, [request([1, 2, 3], params, max_new_tokens=4) for _ in range(2)])
    assert [{emission.exit_layer for emission in text} for text in texts] == [{8}, {2}]
    assert batch.decisions.num_nan == 4 * len(EXITS)


@pytest.mark.parametrize("measure", ["gate", "cosine"])
def test_only_exits_that_fire_project_where_hidden_states_decide(
    model: OpenedModel, measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    projected: Counter[int] = Counter()
    project = Runner.project

    def counting(self: Runner, features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        projected[layer] += len(features_NH)
        return project(self, features_NH, layer)

    monkeypatch.setattr(Runner, "project", counting)

    def layers(name: str) -> Counter[int]:
        requests = [request(_tokens(length, seed=length), _params(model, name)) for length in LENGTHS]
        projected.clear()
        texts = decode(Batch(model, slots=4, capacity=64), requests)
        return Counter(emission.exit_layer for text in texts for emission in text)

    left_at = layers(measure)
    assert projected == left_at, "one projection a token"
    left_at = layers("margin")
    assert projected.total() > left_at.total(), "by logits every exit on the way projects"


def test_a_model_without_gates_refuses_by_name(mesh: Mesh) -> None:
    def batch(**more: Any) -> Batch:
        return Batch(opened(whole_model(mesh, exits=[2, 5], **more)), slots=1, capacity=16)

    with pytest.raises(UserError, match=r"gate, but the model has no gate after layers \[2, 5\], none at all"):
        batch().add(request([1], ExitParams(measure="gate")))
    half = batch(gate=["none", "linear"])
    with pytest.raises(UserError, match=r"no gate after layers \[2\], only after \[5\]"):
        half.add(request([1], ExitParams(measure="gate")))
    assert half.free_slots == 1, "what is refused takes no slot"
    half.add(request([1], ExitParams(measure="gate", exits=(5,))))
    batch().add(request([1], ExitParams(measure="gate", mode="full")))  # nobody is asked


def test_a_measure_that_is_not_there_is_named(model: OpenedModel) -> None:
    with pytest.raises(UserError, match=r"inference.exit.measure: 'entropi' must be one of .*; did you mean 'entropy'"):
        Batch(model, slots=1, capacity=16).add(request([1], ExitParams(measure="entropi")))
