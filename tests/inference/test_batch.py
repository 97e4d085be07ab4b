"""Batched decoding against one pass without a cache: logits, tokens, depths, and keys and values."""

import random

import pytest
import torch
from helpers.decoding import decode, full_logits, opened, request, tokens_of
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import ExitParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.depth_walk import DepthWalk
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

EXITS = [2, 5]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

KINDS = {
    "fp32": (torch.float32, "norm"),
    "fp64": (torch.float64, "norm"),
    "fp64, one norm": (torch.float64, "norm"),
    "fp32, MLP and block": (torch.float32, ["mlp", "block"]),
    "fp64, block and MLP": (torch.float64, ["block", "mlp"]),
    "fp64, windows": (torch.float64, ["block", "mlp"]),
}
WINDOWS = {  # the block's layer has one, too; shorter than prompts
    "sliding_window": 4,
    "sliding_window_layers": [2, 3, 6, 8],
    "qkv_bias": True,
    "qk_norm": True,
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    dtype, head = KINDS[request.param]
    norm = "shared" if "one norm" in request.param else "own"
    fields = WINDOWS if "windows" in request.param else {}
    return opened(whole_model(mesh, exits=EXITS, dtype=dtype, head=head, norm=norm, model=fields))


def _batch(model: OpenedModel, slots: int = 4, **more: int) -> Batch:
    return Batch(model, slots=slots, capacity=64, **more)


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _tolerance(model: OpenedModel) -> float:
    return TOLERANCE[next(model.stage.parameters()).dtype]


def _thresholds_that_mix(stage: Stage, tokens: list[int]) -> dict[int, float]:
    """About half of the tokens leave at each exit; no confidence is so near that rounding decides."""

    def between(confidences: torch.Tensor) -> float:
        ascending, middle = confidences.sort().values, len(confidences) // 2
        gaps = ascending.diff()[middle - 4 : middle + 4]
        widest = middle - 4 + int(gaps.argmax())
        return float(ascending[widest : widest + 2].mean())

    return {layer: between(full_logits(stage, tokens, layer).softmax(-1).amax(-1)) for layer in EXITS}


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]], ids=str)
@torch.inference_mode()
def test_cached_logits_equal_the_full_forward(model: OpenedModel, chunks: list[int]) -> None:
    """Also of two sequences of unequal length in one launch."""
    tokens, others = _tokens(12), _tokens(17, seed=1)
    walk = DepthWalk(model.runner, model.exits, slots=3, capacity=64, room=64)
    for slot in (2, 0):
        walk.ledger.open(slot)
    expected_SV, expected_other_SV = full_logits(model.stage, tokens, 8), full_logits(model.stage, others, 8)
    fed = 0
    for number, size in enumerate(chunks):
        part = others[:5] if number == 0 else others[4 + number : 5 + number]
        logits_2V = walk.enter({2: tokens[fed : fed + size], 0: part}, 8).ask([2, 0]).logits
        fed += size
        wanted_2V = torch.stack((expected_SV[fed - 1], expected_other_SV[4 + number]))
        torch.testing.assert_close(logits_2V, wanted_2V, atol=_tolerance(model), rtol=0)


@pytest.mark.parametrize("policy", ["recompute", "fill"])
@pytest.mark.parametrize(("prompt_length", "max_pending"), [(1, 1), (7, 3), (9, 1000)])
def test_decoding_ragged_batches_equals_teacher_forced_full_depth(
    model: OpenedModel, policy: str, prompt_length: int, max_pending: int
) -> None:
    """Depths and tokens are what one pass over the finished text says at each exit, and flushed keys and values are
    those of all layers; also where prompts exit, and where the limit on pending positions strikes."""
    thresholds = _thresholds_that_mix(model.stage, _tokens(30))
    params = ExitParams(thresholds=thresholds, kv_policy=policy, max_pending=max_pending)
    requests = [request(_tokens(prompt_length + 3 * number, seed=number), params) for number in range(4)]
    batch = _batch(model, max_pending=max_pending, prefill_chunk=8)
    texts = decode(batch, requests)
    pending = [batch.walk.ledger.pending(slot) for slot in range(4)]
    assert {emission.exit_layer for text in texts for emission in text} == {2, 5, 8}, "the case is to mix depths"
    assert any(pending), "something has to be pending"
    batch.flush(range(4))
    for slot, (of, text) in enumerate(zip(requests, texts, strict=True)):
        tokens = [*of.prompt, *tokens_of(text)]
        _assert_as_by_full_depth(model, thresholds, tokens, text)
        _assert_keys_and_values_of_full_depth(model, batch.walk, slot, tokens[:-1])


@torch.no_grad()
def _assert_as_by_full_depth(model: OpenedModel, thresholds, tokens, text) -> None:
    logits = {layer: full_logits(model.stage, tokens, layer)[-len(text) - 1 : -1] for layer in (*EXITS, 8)}
    for number, emission in enumerate(text):
        confidence = {layer: float(logits[layer][number].softmax(-1).max()) for layer in EXITS}
        layer = next((layer for layer in EXITS if confidence[layer] >= thresholds[layer]), 8)
        assert emission.exit_layer == layer
        assert emission.token == int(logits[layer][number].argmax())
        assert emission.confidence == pytest.approx(confidence.get(layer, 1.0), abs=1e-5)


@torch.inference_mode()
def _assert_keys_and_values_of_full_depth(model: OpenedModel, walk: DepthWalk, slot: int, tokens: list[int]) -> None:
    """Of all layers, and of blocks in exit heads."""
    blocks = [layer for layer in EXITS if model.runner.attends(layer)]
    full = DepthWalk(model.runner, model.exits, slots=1, capacity=64, room=64)
    full.ledger.open(0, blocks=blocks)
    full.enter({0: tokens}, 8)
    for number in walk.cache.windows:
        ours, theirs = walk.cache.read(number, slot, len(tokens)), full.cache.read(number, 0, len(tokens))
        for actual, expected in zip(ours, theirs, strict=True):
            assert float((actual - expected).abs().max()) <= _tolerance(model), f"attention {number}"
    assert walk.ledger.pending(slot) == 0
    assert all(walk.ledger.block_length(slot, layer) == len(tokens) for layer in blocks)


def test_threshold_one_equals_full_depth_and_zero_the_first_exit(model: OpenedModel) -> None:
    def generate(params: ExitParams):
        (text,) = decode(_batch(model), [request([1, 2, 3], params)])
        return text

    full, never = generate(ExitParams(mode="full")), generate(ExitParams(threshold=1.0))
    assert tokens_of(never) == tokens_of(full)
    assert {emission.exit_layer for emission in never} == {8}
    for params, layer in (
        ({"threshold": 0.0}, 2),
        ({"threshold": 0.0, "min_exit": 3}, 5),
        ({"threshold": 0.0, "exits": (5,)}, 5),
        ({"thresholds": {2: 1.0, 5: 0.0}}, 5),
    ):
        assert {emission.exit_layer for emission in generate(ExitParams(**params))} == {layer}
    assert tokens_of(full) == model.full_depth_choices([1, 2, 3, *tokens_of(full)])[2:-1]


def test_fills_that_stop_at_a_neighbours_exit_are_met_there(mesh: Mesh) -> None:
    """A sequence that asks one exit has positions that wait at another, where a neighbour's launch took them."""
    model = opened(whole_model(mesh, exits=EXITS, dtype=torch.float64))
    numbers = random.Random(28)  # it is rare: the second case here is one
    for _ in range(3):
        first, second, third, fourth = (numbers.choice([0.015, 0.05, 0.06, 0.08, 0.1]) for _ in range(4))
        modes = [
            ExitParams(exits=(2,), threshold=first, kv_policy="fill"),
            ExitParams(thresholds={2: third, 5: second}),
            ExitParams(exits=(5,), threshold=fourth),
        ]
        requests = [
            request([numbers.randrange(VOCAB_SIZE) for _ in range(3)], mode, max_new_tokens=numbers.randint(1, 8))
            for mode in modes
        ]
        texts = decode(_batch(model), requests)
        alone = [decode(_batch(model), [of])[0] for of in requests]
        assert [_said(text) for text in texts] == [_said(text) for text in alone]


def _said(text: list[Emission]) -> list[tuple[int, int]]:
    return [(emission.token, emission.exit_layer) for emission in text]
