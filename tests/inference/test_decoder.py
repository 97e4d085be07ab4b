"""Decoding against the full forward: same logits from the cache, same tokens at threshold 1, exact keys and values."""

import pytest
import torch
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import ExitParams
from megatron_ee.inference.decoder import Decoder
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.policies import MEASURES, max_probability
from megatron_ee.inference.request import Emission, Request
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.tokenizer import ByteTokenizer

EXITS = [2, 5]
NO_STOP = VOCAB_SIZE
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
def stage(request: pytest.FixtureRequest, mesh: Mesh) -> Stage:
    dtype, head = KINDS[request.param]
    norm = "shared" if "one norm" in request.param else "own"
    model = WINDOWS if "windows" in request.param else {}
    return whole_model(mesh, exits=EXITS, dtype=dtype, head=head, norm=norm, model=model)


def _decoder(stage: Stage, thresholds: dict[int, float], *, max_pending: int = 1000) -> Decoder:
    return Decoder(stage, thresholds, max_probability, max_pending=max_pending, capacity=64)


def _full_logits(stage: Stage, tokens: list[int], layer: int) -> torch.Tensor:
    """[S, V] at an exit, from one pass without a cache."""
    with torch.no_grad():
        positions = torch.arange(len(tokens))
        _, taps = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, layer)
        return stage.exit_logits(taps[stage.tap_of(layer)], layer, positions).squeeze(1)


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _tolerance(stage: Stage) -> float:
    return TOLERANCE[next(stage.parameters()).dtype]


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]], ids=str)
def test_cached_logits_equal_the_full_forward(stage: Stage, chunks: list[int]) -> None:
    tokens = _tokens(sum(chunks))
    expected_SV = _full_logits(stage, tokens, 8)
    decoder, fed = _decoder(stage, {}), 0
    for size in chunks:
        outcome = decoder.feed(tokens[fed : fed + size])
        fed += size
        assert outcome.exit_layer == 8
        torch.testing.assert_close(outcome.logits_V, expected_SV[fed - 1], atol=_tolerance(stage), rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_logits_at_each_exit_equal_a_model_that_always_ran_deeper(stage: Stage, seed: int) -> None:
    """Whatever exits fired before, an exit sees what it would see if all earlier tokens had run in full."""
    tokens = _tokens(30, seed)
    expected = {layer: _full_logits(stage, tokens, layer) for layer in (*EXITS, 8)}
    decoder = _decoder(stage, _thresholds_that_mix(expected))
    used = set()
    for position, token in enumerate(tokens):
        outcome = decoder.feed([token])
        used.add(outcome.exit_layer)
        actual_V = outcome.logits_V
        torch.testing.assert_close(actual_V, expected[outcome.exit_layer][position], atol=_tolerance(stage), rtol=0)
    assert used == {2, 5, 8}, "the case is to mix depths"


@pytest.mark.parametrize("max_pending", [1, 3, 1000])
@pytest.mark.parametrize("prompt_length", [1, 7])
def test_keys_and_values_after_flush_equal_full_depth(stage: Stage, prompt_length: int, max_pending: int) -> None:
    tokens = _tokens(30)
    expected = {layer: _full_logits(stage, tokens, layer) for layer in (*EXITS, 8)}
    thresholds = _thresholds_that_mix(expected)
    decoder = _decoder(stage, thresholds, max_pending=max_pending)
    depths = [decoder.feed(tokens[:prompt_length]).exit_layer]
    depths += [decoder.feed([token]).exit_layer for token in tokens[prompt_length:]]
    assert min(depths) < 8, "something has to be pending"
    decoder.flush()
    _assert_same_store(stage, decoder.cache, _full_cache(stage, tokens), len(tokens))


def test_a_limit_on_pending_positions_changes_no_decision(stage: Stage) -> None:
    tokens = _tokens(30)
    thresholds = _thresholds_that_mix({layer: _full_logits(stage, tokens, layer) for layer in (*EXITS, 8)})
    depths = []
    for max_pending in (1, 2, 1000):
        decoder = _decoder(stage, thresholds, max_pending=max_pending)
        depths.append([decoder.feed([token]).exit_layer for token in tokens])
    assert depths[0] == depths[1] == depths[2]


def test_catching_up_computes_nothing_shallow_twice(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = _tokens(20)
    thresholds = _thresholds_that_mix({layer: _full_logits(stage, tokens, layer) for layer in (*EXITS, 8)})
    rows: dict[tuple[int, int], list[int]] = {}
    run_layers = Stage.run_layers

    def counting(self: Stage, x: torch.Tensor, positions: torch.Tensor, start: int, stop: int, **kwargs: object):
        rows.setdefault((start, stop), []).extend(positions.tolist())
        return run_layers(self, x, positions, start, stop, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Stage, "run_layers", counting)
    decoder = _decoder(stage, thresholds)
    for token in tokens:
        decoder.feed([token])
    decoder.flush()
    assert {segment: sorted(positions) for segment, positions in rows.items()} == {
        segment: list(range(len(tokens))) for segment in [(0, 2), (2, 5), (5, 8)]
    }


def test_threshold_one_equals_full_depth_and_zero_the_first_exit(stage: Stage) -> None:
    engine = Engine(stage, _TinyTokenizer(), EXITS, MEASURES)
    full = _generate(engine, ExitParams(mode="full"))
    never = _generate(engine, ExitParams(threshold=1.0))
    assert [emission.token for emission in never] == [emission.token for emission in full]
    assert {emission.exit_layer for emission in never} == {8}
    assert {emission.exit_layer for emission in _generate(engine, ExitParams(threshold=0.0))} == {2}
    assert {emission.exit_layer for emission in _generate(engine, ExitParams(threshold=0.0, min_exit=3))} == {5}
    assert {emission.exit_layer for emission in _generate(engine, ExitParams(threshold=0.0, exits=(5,)))} == {5}
    assert {emission.exit_layer for emission in _generate(engine, ExitParams(thresholds={2: 1.0, 5: 0.0}))} == {5}


def test_greedy_at_full_depth_is_the_full_models_choice(stage: Stage) -> None:
    engine = Engine(stage, _TinyTokenizer(), EXITS, MEASURES)
    prompt = _tokens(5)
    tokens = [emission.token for emission in _generate(engine, ExitParams(mode="full"), prompt)]
    assert tokens == engine.full_depth_choices(prompt + tokens)[len(prompt) - 1 : -1]


def test_sampling_depends_on_the_seed_alone(stage: Stage) -> None:
    engine = Engine(stage, _TinyTokenizer(), EXITS, MEASURES)

    def draw(seed: int) -> list[int]:
        request = Request(prompt=(1, 2), max_new_tokens=20, stop=NO_STOP, temperature=1.0, top_k=8, seed=seed)
        return [emission.token for emission in engine.generate(request)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_generation_stops_at_the_stop_token(stage: Stage) -> None:
    engine = Engine(stage, _TinyTokenizer(), EXITS, MEASURES)
    tokens = [emission.token for emission in _generate(engine, ExitParams(mode="full"))]
    stop = tokens[4]
    request = Request(prompt=(1, 2, 3), max_new_tokens=16, stop=stop, exit=ExitParams(mode="full"))
    assert [emission.token for emission in engine.generate(request)] == tokens[: tokens.index(stop)]


def test_a_request_for_an_exit_that_is_not_there_is_refused(stage: Stage) -> None:
    engine = Engine(stage, _TinyTokenizer(), EXITS, MEASURES)
    with pytest.raises(ValueError, match=r"the model has exits after layers \[2, 5\], none after \[3\]"):
        _generate(engine, ExitParams(exits=(3,)))


def _thresholds_that_mix(expected: dict[int, torch.Tensor]) -> dict[int, float]:
    """About half of the tokens leave at each exit; no confidence is so near that rounding decides."""

    def between(confidences: torch.Tensor) -> float:
        ascending, middle = confidences.sort().values, len(confidences) // 2
        gaps = ascending.diff()[middle - 4 : middle + 4]
        widest = middle - 4 + int(gaps.argmax())
        return float(ascending[widest : widest + 2].mean())

    return {layer: between(expected[layer].flatten(0, -2).softmax(-1).amax(-1)) for layer in EXITS}


def _full_cache(stage: Stage, tokens: list[int]) -> KeyValueCache:
    cache = KeyValueCache(stage, 64)
    positions = torch.arange(len(tokens))
    cache.begin_launch(positions)
    with torch.no_grad():
        _, taps = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, 8, store=cache)
        for tap, hidden_SBH in taps.items():
            stage.exit_features(hidden_SBH, tap.layer, positions, store=cache)
    return cache


def _assert_same_store(stage: Stage, actual: KeyValueCache, expected: KeyValueCache, length: int) -> None:
    """Of all layers, and of blocks in exit heads."""
    for number in stage.attention_windows:
        for ours, theirs in zip(actual.read(number, length), expected.read(number, length), strict=True):
            assert float((ours - theirs).abs().max()) <= _tolerance(stage), f"attention {number}"


def _generate(engine: Engine, params: ExitParams, prompt: list[int] | None = None) -> list[Emission]:
    request = Request(prompt=tuple(prompt or [1, 2, 3]), max_new_tokens=16, stop=NO_STOP, exit=params)
    return list(engine.generate(request))


class _TinyTokenizer(ByteTokenizer):
    vocab_size = VOCAB_SIZE
