"""What EE-LLM's decoding gets wrong (Chen et al. 2023, as published), each under a test that names it, as far as one
batch is concerned; and what it trains otherwise than it decodes.

Its exits that are decided by a batch's last row are in test_exit_decisions.py, too, for every measure.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.decoding import (
    TinyTokenizer,
    decode,
    full_logits,
    keys_and_values,
    opened,
    request,
    texts_of,
    tokens_of,
)
from helpers.models import whole_model
from helpers.saved import save_random_run
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_config

from megatron_ee.config import Config, ConfigError, ExitParams, load_config, to_yaml
from megatron_ee.device import Device
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.depth_walk import DepthWalk
from megatron_ee.inference.loading import load_model
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.losses import exit_loss

EXITS = [2, 5]


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _depths(text: Sequence[Emission]) -> list[int]:
    return [emission.exit_layer for emission in text]


def _said(text: Sequence[Emission]) -> list[tuple[int, int]]:
    return [(emission.token, emission.exit_layer) for emission in text]


@torch.no_grad()
def _medians(stage: Stage) -> dict[int, float]:
    """Thresholds that about half of the tokens reach."""
    return {layer: float(full_logits(stage, _tokens(41, 9), layer).softmax(-1).amax(-1).median()) for layer in EXITS}


def test_ee_llm_lets_the_last_row_of_a_batch_decide_for_all(mesh: Mesh) -> None:
    """Here each row decides for itself, in whatever order rows are."""
    model = opened(whole_model(mesh, exits=EXITS, dtype=torch.float64))
    params = ExitParams(thresholds=_medians(model.stage))
    requests = [request(_tokens(5, seed), params) for seed in range(4)]
    texts = texts_of(model, requests)
    assert len({tuple(_depths(text)) for text in texts}) == 4, "the case is to mix depths"
    said = [_said(text) for text in texts]
    assert [_said(text) for text in texts_of(model, requests[::-1])] == said[::-1]
    assert [_said(*texts_of(model, [of])) for of in requests] == said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ee_llm_recomputes_missing_keys_and_values_with_a_wrong_mask_in_bf16(mesh: Mesh, dtype: torch.dtype) -> None:
    """Positions that are caught up see what is before them and nothing after, in half precision, too: they are as near
    to fp64 as a pass at full depth in that precision is."""
    model = opened(whole_model(mesh, exits=EXITS, dtype=dtype, model={"qk_norm": True}))
    params = ExitParams(thresholds=_medians(model.stage), max_pending=6)
    requests = [request(_tokens(length, length), params, max_new_tokens=24) for length in (9, 4)]
    batch = Batch(model, slots=2, capacity=48, max_pending=6)
    texts = decode(batch, requests)
    batch.flush([0, 1])
    exact = whole_model(mesh, exits=EXITS, dtype=torch.float64, model={"qk_norm": True})
    exact.load_state_dict({name: of.double() for name, of in model.stage.named_parameters()}, strict=False)
    for slot, (of, text) in enumerate(zip(requests, texts, strict=True)):
        assert len(set(_depths(text))) > 1, "the case is to mix depths"
        tokens = [*of.prompt, *tokens_of(text)][:-1]
        expected, in_one_pass = keys_and_values(exact, tokens), keys_and_values(model.stage, tokens)
        for number in range(1, 9):
            caught_up = batch.walk.cache.read(number, slot, len(tokens))
            for ours_GTD, theirs_GTD, one_GTD in zip(caught_up, expected[number], in_one_pass[number], strict=True):
                error, of_one_pass = ((part - theirs_GTD).abs().max() for part in (ours_GTD, one_GTD))
                assert error <= 4 * of_one_pass + 1e-6, f"layer {number}"


def test_ee_llm_runs_the_prompt_again_after_an_exit_in_prefill(mesh: Mesh) -> None:
    """Here no layer runs twice for any position."""
    model = opened(whole_model(mesh, exits=EXITS, dtype=torch.float64))
    prompt = _tokens(11)
    batch = Batch(model, slots=1, capacity=32)
    (text,) = decode(batch, [request(prompt, ExitParams(threshold=0.0), max_new_tokens=1)])
    assert _depths(text) == [2]
    assert dict(batch.walk.work.rows) == {(0, 2): 11}, "the prompt has left, too"
    batch = Batch(model, slots=1, capacity=32)
    params = ExitParams(thresholds=_medians(model.stage))
    (text,) = decode(batch, [request(prompt, params)])
    batch.flush([0])
    assert set(_depths(text)) == {2, 5, 8} and _depths(text)[0] < 8, (
        "the case is to leave in prefill, and to mix depths"
    )
    assert dict(batch.walk.work.rows) == dict.fromkeys([(0, 2), (2, 5), (5, 8)], 11 + 16 - 1)


def _with_yaml(folder: Path, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(to_yaml(tiny_config()))
    return load_config(path, overrides)


def test_ee_llm_rejects_a_threshold_that_is_an_integer(tmp_path: Path, mesh: Mesh) -> None:
    model = opened(whole_model(mesh, exits=EXITS))
    for integer, layer in ((1, 8), (0, 2)):
        params = _with_yaml(tmp_path, f"inference.exit.threshold={integer}").inference.exit
        assert params == ExitParams(threshold=integer) == ExitParams(threshold=float(integer))
        (text,) = texts_of(model, [request([1, 2], params)])
        assert set(_depths(text)) == {layer}


def test_ee_llm_reads_false_as_true(tmp_path: Path, mesh: Mesh) -> None:
    """A word is no truth value, false is no number; and what is false is not done."""
    sampling = _with_yaml(tmp_path, "inference.sampling.ignore_eos=false").inference.sampling
    assert sampling.ignore_eos is False
    for word in ("'false'", "'no'", "0"):
        with pytest.raises(ConfigError, match=r"inference\.sampling\.ignore_eos"):
            _with_yaml(tmp_path, f"inference.sampling.ignore_eos={word}")
    with pytest.raises(ConfigError, match=r"inference\.exit\.threshold: false is not a number"):
        _with_yaml(tmp_path, "inference.exit.threshold=false")
    model = opened(whole_model(mesh, exits=EXITS))
    (text,) = texts_of(model, [request([1, 2], ExitParams())])
    assert text[0].exit_logprobs is None and text[0].logprobs is None


@pytest.mark.parametrize("chunk_rows", [0, 5])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_ee_llm_decodes_without_the_temperature_that_it_trained_with(
    mesh: Mesh, temperature: float, chunk_rows: int
) -> None:
    """The distribution whose cross-entropy an exit is trained on is the one by which decoding decides, and samples."""
    stage = whole_model(mesh, exits=EXITS, temperature=[1.0, temperature]).train()
    tokens, positions = _tokens(SEQUENCE_LENGTH), torch.arange(SEQUENCE_LENGTH)
    _, taps = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, 8)
    features_SBH = stage.exit_features(taps[stage.tap_of(5)], 5, positions)
    last_BS = torch.zeros(1, SEQUENCE_LENGTH)
    last_BS[0, -1] = 1

    def trained(label: int) -> float:
        labels_BS = torch.full_like(positions, label)[None]
        loss = exit_loss(stage, features_SBH, 5, labels_BS, last_BS, scale=1, chunk_rows=chunk_rows)
        return -float(loss.cross_entropy)

    trained_V = [trained(label) for label in range(VOCAB_SIZE)]
    params = ExitParams(thresholds={2: 1.0, 5: 0.0})
    ((emission,),) = texts_of(opened(stage.eval()), [request(tokens, params, max_new_tokens=1, logprobs=VOCAB_SIZE)])
    assert emission.exit_layer == 5 and emission.logprobs is not None
    decoded_V = [emission.logprobs.top[label] for label in range(VOCAB_SIZE)]
    np.testing.assert_allclose(decoded_V, trained_V, atol=1e-5)
    assert emission.confidence == pytest.approx(np.exp(max(trained_V)), abs=1e-5)
    untempered_V = features_SBH[-1].flatten() @ stage.output.weight.T / temperature  # type: ignore[union-attr]
    np.testing.assert_allclose(decoded_V, untempered_V.log_softmax(-1), atol=1e-5)


@torch.inference_mode()
def _logits_at(model: OpenedModel, tokens: Sequence[int], layer: int) -> torch.Tensor:
    """[S, V] of an exit with a block, fed token by token."""
    walk = DepthWalk(model.runner, model.exits, slots=1, capacity=64, room=64)
    walk.ledger.open(0, blocks=[layer])
    return torch.cat([walk.enter({0: [token]}, layer).ask([0]).logits for token in tokens])


def test_ee_llm_serves_a_block_with_rotary_positions_that_it_trained_without(mesh: Mesh) -> None:
    """A block is decoded as it is trained, and both look at how far apart positions are."""
    stage = whole_model(mesh, exits=[2], head="block", dtype=torch.float64)
    tokens, positions = _tokens(SEQUENCE_LENGTH), torch.arange(SEQUENCE_LENGTH)
    decoded_SV = _logits_at(opened(stage), tokens, 2)
    with torch.no_grad():
        _, taps = stage.train().run_layers(stage.embed(torch.tensor([tokens])), positions, 0, 2)
        hidden_SBH = taps[stage.tap_of(2)]
        trained_SV, without_SV = (stage.exit_logits(hidden_SBH, 2, at)[:, 0] for at in (positions, 0 * positions))
    torch.testing.assert_close(decoded_SV, trained_SV, atol=1e-10, rtol=0)
    assert not torch.allclose(decoded_SV, without_SV, atol=1e-3)


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 40])
def test_ee_llm_has_a_vocabulary_size_written_into_its_loop(mesh: Mesh, vocab_size: int) -> None:
    """Here it is the tokenizer's: rows beyond are padding, which is never chosen and takes no probability, however
    likely it looks."""
    stage = whole_model(mesh, exits=EXITS, dtype=torch.float64)
    with torch.no_grad():
        stage.output.weight[vocab_size:] *= 50  # type: ignore[union-attr, index]
    model = OpenedModel(stage, TinyTokenizer(vocab_size), tuple(EXITS), opened(stage).measures)
    prompt = _tokens(5, seed=3)
    prompt = [token % vocab_size for token in prompt]
    for params in (ExitParams(mode="full"), ExitParams(threshold=0.0), ExitParams(thresholds=_medians(stage))):
        for temperature in (0.0, 1.0):
            ((*_, last),) = texts_of(model, [request(prompt, params, temperature=temperature, logprobs=VOCAB_SIZE)])
            assert last.token < vocab_size and last.logprobs is not None
            assert sorted(last.logprobs.top) == list(range(vocab_size))
            assert sum(map(np.exp, last.logprobs.top.values())) == pytest.approx(1.0)
            assert last.exit_layer == 8 or last.confidence == pytest.approx(np.exp(max(last.logprobs.top.values())))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ee_llm_does_not_restore_the_dtype_of_a_checkpoint(
    tmp_path: Path, mesh: Mesh, cpu: Device, precision: str
) -> None:
    config, _ = save_random_run(tmp_path / "run", mesh, precision, layers=[2, 5])
    other = config.model_copy(update={"training": config.training.model_copy(update={"precision": "fp32"})})
    model = load_model(tmp_path / "run/checkpoints/step_00000007", other, cpu)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {parameter.dtype for parameter in model.stage.parameters()} == {dtype}
    assert model.stage.config.params_dtype == dtype
    batch = Batch(model, slots=1, capacity=32)
    (text,) = decode(batch, [request([1, 2, 3], ExitParams(threshold=0.5))])
    assert len(text) == 16
    assert batch.walk.cache.of(1).dtype == dtype


@pytest.mark.parametrize("layer", [2, 8])
def test_ee_llm_never_stops_at_the_end_of_a_text(mesh: Mesh, layer: int) -> None:
    """Where its pipeline decodes; here a text ends with the model's own stop token, whichever exit says it."""
    model = opened(whole_model(mesh, exits=EXITS))
    params = ExitParams.model_validate({"mode": "full"} if layer == 8 else {"threshold": 0.0})
    prompts = [_tokens(4, seed) for seed in range(3)]
    endless = [tokens_of(text) for text in texts_of(model, [request(prompt, params) for prompt in prompts])]
    stop = endless[1][3]
    expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in endless]
    assert len({len(tokens) for tokens in expected}) > 1, "one ends before another"
    for sampling, said in (({}, expected), ({"ignore_eos": True}, endless)):
        requests = [request(prompt, params, **sampling) for prompt in prompts]
        texts = texts_of(model, [replace(of, stop_token_ids=(stop,)) for of in requests])
        assert [tokens_of(text) for text in texts] == said
        for text in texts:
            assert all(emission.finish is None for emission in text[:-1])
            ends = text[-1].token == stop and not sampling
            assert text[-1].finish == ("stop" if ends else "length")
