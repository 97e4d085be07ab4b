"""Too little memory for keys and values, and memory of others: no text is another one for it."""

import pytest
import torch
from helpers.decoding import opened, request, texts_of
from helpers.engines import (
    STRATEGIES,
    assert_blocks_and_ledger_agree,
    assert_nothing_is_left,
    engine_of,
    requests_of,
    said,
)
from helpers.models import whole_model

from megatron_ee.config import ExitParams
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.parallel.mesh import Mesh


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_makes_way_says_the_same_in_the_end(model: OpenedModel, strategy: str) -> None:
    """Memory for two or three of them: many are paused in the middle, drafts and samples among them."""
    requests = requests_of(11, 16, longest=30)
    engine = engine_of(model, strategy, residents=8, blocks=Blocks(8, 60, 1), whole=False)
    numbers = [engine.add(of) for of in requests]
    texts: dict[int, list[Emission]] = {number: [] for number in numbers}
    while not engine.is_idle:
        for number, emission in engine.step():
            assert isinstance(emission, Emission)
            texts[number].append(emission)
        assert_blocks_and_ledger_agree(engine)
    assert engine.num_paused > 5
    assert_nothing_is_left(engine, 8)
    for number, of in zip(numbers, requests, strict=True):
        (alone,) = texts_of(model, [of])
        assert said(texts[number]) == said(alone), of


def test_the_first_are_never_paused(model: OpenedModel) -> None:
    """By priority, then by arrival: whoever comes before all others ends as if it were alone."""
    params = ExitParams(mode="full")
    engine = engine_of(model, "compaction", residents=4, blocks=Blocks(4, 32, 4), whole=False)
    late = [engine.add(request([1, 2, 3], params, max_new_tokens=20), priority=1) for _ in range(3)]
    engine.step()
    urgent = engine.add(request([4, 5], params, max_new_tokens=20))
    ends: list[int] = []
    steps = 0
    while not engine.is_idle:
        ends += [number for number, of in engine.step() if isinstance(of, Emission) and of.finish]
        steps += 1
        if urgent in ends and steps < 100:
            assert steps <= 21, "one launch to enter and one a token"
            steps = 100
    assert ends == [urgent, *late]
    assert engine.num_paused > 0


def test_nobody_is_taken_in_whose_longest_answer_may_not_fit(model: OpenedModel) -> None:
    engine = engine_of(model, "compaction", residents=4, blocks=Blocks(4, 32, 4))
    for _ in range(4):
        engine.add(request([1, 2, 3, 4], ExitParams(mode="full"), max_new_tokens=12))
    while not engine.is_idle:
        engine.step()
        assert engine.batch.free_slots >= 2, "two of them take 16 positions each"
    assert engine.num_paused == 0
    with pytest.raises(ValueError, match="4 \\+ 30 new tokens do not fit into 32 positions"):
        engine.add(request([1, 2, 3, 4], ExitParams(mode="full"), max_new_tokens=30))


@pytest.mark.parametrize("kv_policy", ["recompute", "fill", "propagate"])
def test_what_a_prompt_shares_with_another_is_not_run_again(model: OpenedModel, kv_policy: str) -> None:
    """But where another exit is asked that attends; and what of a prompt still waits at an exit when its text ends, has
    no keys and values beyond it."""
    params = ExitParams.model_validate({"threshold": 0.05, "kv_policy": kv_policy, "max_pending": 1})
    common = list(range(24))
    engine = engine_of(model, "compaction", residents=2, chunk=64, blocks=Blocks(2, 64, 4), keeps_prefixes=True)

    def serve(*requests: Request) -> tuple[list[list[Emission]], int]:
        """Their texts, and how many rows entered."""
        before = sum(rows for (start, _), rows in engine.batch.walk.work.rows.items() if start == 0)
        texts: dict[int, list[Emission]] = {engine.add(of): [] for of in requests}
        while not engine.is_idle:
            for number, emission in engine.step():
                assert isinstance(emission, Emission)
                texts[number].append(emission)
        entered = sum(rows for (start, _), rows in engine.batch.walk.work.rows.items() if start == 0)
        return list(texts.values()), entered - before

    first, second = (request([*common, last], params, max_new_tokens=2) for last in (40, 41))
    _, entered = serve(first)
    assert entered == 25 + 1
    (text,), entered = serve(second)
    assert entered == 25 - 24 + 1
    assert said(text) == said(texts_of(model, [second])[0])
    (text,), entered = serve(first)
    assert entered == 1 + 1, "the last token of a prompt is asked, whatever is known"
    assert said(text) == said(texts_of(model, [first])[0])
    attends = model.runner.attends(2)
    (text,), entered = serve(of := request([*common, 42], ExitParams(mode="full"), max_new_tokens=2))
    assert entered == (25 if attends else 1) + 1
    assert said(text) == said(texts_of(model, [of])[0])
    _, entered = serve(request(common[:10], ExitParams(mode="full"), max_new_tokens=2))
    assert entered == 10 - 8 + 1, "by whole blocks"
    short = request(common[::-1], ExitParams.model_validate({"threshold": 0.0}), max_new_tokens=1)
    assert serve(short)[1] == serve(short)[1] == 24, "it left at the first exit, and so did all of its prompt"


def test_what_is_no_number_is_never_taken_over(mesh: Mesh) -> None:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, model={"tie_embeddings": False})
    with torch.no_grad():
        assert stage.embedding is not None
        stage.embedding.weight[7] = torch.nan
    model = opened(stage)
    engine = engine_of(model, "compaction", residents=2, blocks=Blocks(2, 64, 4), keeps_prefixes=True)
    engine.add(request([1, 2, 3, 4, 7, 8, 9, 10, 11], ExitParams(mode="full")))
    while not engine.is_idle:
        engine.step()
    for attention in engine.batch.walk.cache.windows:
        assert engine.batch.walk.cache.of(attention).isfinite().all()
