"""SLED and DoLa in batches: each token is the one that the formulas choose from what `Stage` says at full depth and at
each exit, whoever shares the batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.corrections import naive_dola, naive_sled
from helpers.decoding import decode, full_logits, opened, request, texts_of, tokens_of
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.sampling import Draws, NoTokenError, choose, logprobs_of
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

EXITS = [2, 4, 5]
LAST = 8
CORRECTIONS: dict[str, dict[str, Any]] = {
    "sled": {"mode": "sled"},
    "sled, some exits": {"mode": "sled", "sled": {"layers": [5, 2], "alpha": 9.0, "top_k": 5, "steps": 3}},
    "sled, no norm": {"mode": "sled", "sled": {"norm": False, "alpha": 6.0}},
    "sled, block's output": {"mode": "sled", "sled": {"norm": False, "layers": [5], "top_k": 3}},
    "dola": {"mode": "dola"},
    "dola, one exit": {"mode": "dola", "dola": {"layers": [4], "relative_top": 0.0}},
    "dola, no norm": {"mode": "dola", "dola": {"norm": False, "relative_top": 0.3}},
}
OTHERS: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": 0.04, "kv_policy": "fill"},
    {"mode": "speculative", "draft_length": 3},
]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.3},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "told": {"temperature": 1.2, "logit_bias": {7: 2.0}, "seed": 4, "logprobs": 3, "exit_logprobs": True},
}


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> OpenedModel:
    head = ["norm", "mlp", "block"]
    projection, temperature = ["shared", "own", "own"], [1.0, 1.5, 0.8]
    return opened(
        whole_model(
            mesh, exits=EXITS, dtype=torch.float64, head=head, projection=projection, temperature=[*temperature]
        )
    )


def _prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _requests(sampling: dict[str, Any]) -> list[Request]:
    """One of each correction."""
    return [
        request(_prompt(2 + 3 * number, number), ExitParams.model_validate(settings), **sampling)
        for number, settings in enumerate(CORRECTIONS.values())
    ]


@torch.no_grad()
def _said(stage: Stage, tokens: Sequence[int], layer: int, *, by_head: bool) -> torch.Tensor:
    """[S, V] by an exit, from one pass without a cache."""
    if by_head:
        return full_logits(stage, tokens, layer)
    output_SBH, _ = stage.run_layers(stage.embed(torch.tensor([tokens])), torch.arange(len(tokens)), 0, layer)
    return output_SBH[:, 0] @ stage.projection_weight(layer).T / stage.head(layer).temperature


def _assert_as_written(model: OpenedModel, of: Request, text: Sequence[Emission]) -> None:
    """Tokens, depths and log-probabilities, given the text before each."""
    tokens, draws = [*of.prompt, *tokens_of(text)], Draws(of)
    settings = of.exit.sled if of.exit.mode == "sled" else of.exit.dola
    final_SV = full_logits(model.stage, tokens, LAST)
    layers = sorted(settings.layers or EXITS)
    early = {layer: _said(model.stage, tokens, layer, by_head=settings.norm) for layer in layers}
    naive: Any = naive_sled if of.exit.mode == "sled" else naive_dola
    for number, emission in enumerate(text):
        position = len(of.prompt) + number - 1
        corrected = naive(final_SV[position], [exit_SV[position] for exit_SV in early.values()], settings)
        expected_1V = torch.tensor([corrected], dtype=torch.float64)
        (choice,) = choose(expected_1V, [draws])
        assert (emission.token, emission.exit_layer, emission.confidence) == (choice.token, LAST, 1.0)
        draws.answer.append(choice.token)
        if of.sampling.exit_logprobs:
            said = {**{layer: exit_SV[[position]] for layer, exit_SV in early.items()}, LAST: expected_1V}
            assert emission.exit_logprobs is not None and list(emission.exit_logprobs) == list(said)
            assert emission.logprobs == emission.exit_logprobs[LAST]
            for layer, logits_1V in said.items():
                (expected,) = logprobs_of(logits_1V, [choice.token], 3)
                assert emission.exit_logprobs[layer].token == pytest.approx(expected.token, abs=1e-8)
                assert emission.exit_logprobs[layer].top == pytest.approx(expected.top, abs=1e-8)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_says_what_the_formulas_say(model: OpenedModel, sampling: str) -> None:
    requests = _requests(SAMPLINGS[sampling])
    texts = texts_of(model, requests)
    for of, text in zip(requests, texts, strict=True):
        _assert_as_written(model, of, text)
    full = texts_of(model, [request(of.prompt, ExitParams(mode="full"), **SAMPLINGS[sampling]) for of in requests])
    changed = sum(tokens_of(ours) != tokens_of(theirs) for ours, theirs in zip(texts, full, strict=True))
    assert changed >= 4, "the case is to be one in which corrections matter"


def test_sled_at_rate_0_is_full_depth(model: OpenedModel) -> None:
    prompts = [_prompt(length, length) for length in (1, 4, 9)]
    still = ExitParams.model_validate({"mode": "sled", "sled": {"alpha": 0.0}})
    texts = [
        texts_of(model, [request(prompt, params) for prompt in prompts]) for params in (still, ExitParams(mode="full"))
    ]
    assert [tokens_of(text) for text in texts[0]] == [tokens_of(text) for text in texts[1]]


def test_modes_share_a_batch_and_come_and_go(model: OpenedModel) -> None:
    """Each request's text is the one that it gets alone; prompts are longer than what runs at once, too."""
    settings = [*OTHERS, *CORRECTIONS.values()]
    requests = [
        request(_prompt(1 + 2 * number, number), ExitParams.model_validate(of), temperature=number % 3 / 2, seed=number)
        for number, of in enumerate(settings)
    ]
    requests = requests[::2] + requests[1::2]
    batch = Batch(model, slots=4, capacity=40, prefill_chunk=8)
    waiting, inside = dict(enumerate(requests)), {}
    texts: dict[int, list[Emission]] = {number: [] for number in waiting}
    step = 0
    while waiting or inside:
        if waiting and batch.free_slots and step % 3 == 0:
            number = min(waiting)
            inside[batch.add(waiting.pop(number))] = number
        for slot, emission in batch.step():
            texts[inside[slot]].append(emission)
        for slot, number in list(inside.items()):
            if texts[number] and texts[number][-1].finish is not None:
                batch.remove(slot)
                del inside[slot]
        step += 1
    for number, of in enumerate(requests):
        assert tokens_of(texts[number]) == tokens_of(texts_of(model, [of])[0])
        if of.exit.mode in ("sled", "dola"):
            _assert_as_written(model, of, texts[number])


def test_all_layers_run_at_once(model: OpenedModel) -> None:
    batch = Batch(model, slots=2, capacity=40)
    decode(batch, [request(_prompt(5), ExitParams(mode=mode)) for mode in ("sled", "dola")])
    assert [batch.walk.ledger.pending(slot) for slot in (0, 1)] == [0, 0]
    assert batch.walk.ledger.length(0) == 5 + 16 - 1


@torch.no_grad()
def test_an_exit_of_nan_is_not_heard(mesh: Mesh) -> None:
    stage = whole_model(mesh, exits=EXITS, dtype=torch.float64, projection=["shared", "own", "shared"])
    stage.projection_weight(4).fill_(torch.nan)
    model = opened(stage)
    for mode in ("sled", "dola"):
        params = [ExitParams.model_validate({"mode": mode, mode: {"layers": layers}}) for layers in (EXITS, [2, 5])]
        with_it, without_it = texts_of(model, [request(_prompt(6), of) for of in params])
        assert tokens_of(with_it) == tokens_of(without_it)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sled", "dola"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_final_output_of_nan_is_named_by_its_slot(mesh: Mesh, mode: Any, wrong: float) -> None:
    stage = whole_model(mesh, exits=EXITS, dtype=torch.float64, model={"tie_embeddings": False})
    tokens = [_prompt(5, seed) for seed in range(3)]
    stage.embedding.weight[tokens[1][-1]] = wrong
    model = opened(stage)
    batch = Batch(model, slots=3, capacity=40)
    for prompt in tokens:
        assert prompt is tokens[1] or tokens[1][-1] not in prompt
        batch.add(request(prompt, ExitParams(mode=mode)))
    with pytest.raises(NoTokenError) as raised:
        batch.step()
    assert raised.value.rows == (1,)


def test_exits_of_another_vocabulary_are_refused(mesh: Mesh) -> None:
    stage = whole_model(mesh, exits=EXITS, projection=["shared", "own", "shared"])
    stage.head(4).output.weight = torch.nn.Parameter(torch.zeros(40, 32), requires_grad=False)
    batch = Batch(opened(stage), slots=1, capacity=40)
    with pytest.raises(FieldError, match=r"inference.exit.mode: dola needs one vocabulary: .* 64, exit 4 has 40"):
        batch.add(request([1], ExitParams(mode="dola")))
    assert batch.free_slots == 1
    batch.add(request([1], ExitParams.model_validate({"mode": "dola", "dola": {"layers": [2, 5]}})))
