"""What exits save and cost: a case by hand, and counts of real decoding."""

from collections import Counter

import pytest
from helpers.decoding import opened
from helpers.models import whole_model
from helpers.tiny import tiny_config

from megatron_ee import LLM, ExitParams, SamplingParams
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.savings import Savings, Weights, savings_of
from megatron_ee.inference.work import Work
from megatron_ee.parallel.mesh import Mesh

WEIGHTS = Weights(
    layers=(10, 10, 10, 10), keys_and_values=(2, 2, 2, 2), features={2: 1, 4: 1}, projections={2: 20, 4: 20}
)
EXITS = [2, 5]


def test_a_case_by_hand() -> None:
    """A prompt of three tokens, and two rounds more: the first token leaves at 2, the next one takes it along."""
    work = Work(
        rounds=3,
        turns=3,
        launches=Counter({(0, 2): 3, (2, 4): 2}),
        rows=Counter({(0, 2): 5, (2, 4): 5}),
        features=Counter({2: 3, 4: 2}),
        feature_rows=Counter({2: 3, 4: 2}),
        projections=Counter({2: 3, 4: 2}),
        projected=Counter({2: 3, 4: 2}),
    )
    savings = savings_of(work, WEIGHTS, num_tokens=3)
    assert (savings.bytes_at_full_depth, savings.bytes_not_read) == (120, 20)
    assert savings.share_not_read == pytest.approx(1 / 6)
    assert (savings.num_asked, savings.head_bytes) == (3, 5 * 21 - 3 * 21)
    assert savings.arithmetic_saved == 0
    assert savings.head_arithmetic == pytest.approx((5 - 3) * 21 / 200)


def test_keys_and_values_that_are_propagated_are_read_and_computed() -> None:
    work = Work(
        rounds=2,
        turns=2,
        launches=Counter({(0, 2): 2, (2, 4): 1}),
        rows=Counter({(0, 2): 2, (2, 4): 1}),
        stores=Counter({(2, 4): 1}),
        stored=Counter({(2, 4): 1}),
    )
    savings = savings_of(work, WEIGHTS, num_tokens=2)
    assert savings.bytes_not_read == 80 - 60 - 4
    assert savings.arithmetic_saved == pytest.approx(1 - 64 / 80)


def test_work_adds_and_subtracts() -> None:
    one, other = Work(rounds=1, rows=Counter({(0, 2): 3})), Work(rounds=2, rows=Counter({(0, 2): 1, (2, 4): 1}))
    assert (one + other) - other == one
    assert (one + other).rows == {(0, 2): 4, (2, 4): 1}


@pytest.fixture(scope="module", params=["norm", "mlp", "block"])
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    return opened(whole_model(mesh, exits=EXITS, head=request.param))


def _decode(model: OpenedModel, prompts: list[list[int]], exit: ExitParams) -> Savings:
    llm = LLM.of(model, tiny_config())
    before = llm.work  # the heads', of all tests
    texts = llm.generate(prompts, SamplingParams(max_new_tokens=6), exit)
    num_tokens = sum(len(text.tokens) for text in texts)
    return savings_of(llm.work - before, model.facts.weights, num_tokens=num_tokens)


def test_weights_are_all_of_the_models(model: OpenedModel) -> None:
    """Each parameter once, but for the embedding, of which a token reads a row; the projection is shared by three."""
    weights, stage = model.facts.weights, model.stage
    parameters = {name: parameter.nbytes for name, parameter in stage.named_parameters()}
    total = sum(size for name, size in parameters.items() if not name.startswith("embedding"))
    output = parameters["output.weight"]
    assert list(weights.projections) == [2, 5, 8] and set(weights.projections.values()) == {output}
    assert sum(weights.layers) + sum(weights.features.values()) + output == total
    qkv = parameters["layers.1.self_attention.linear_qkv.weight"]
    assert set(weights.keys_and_values) == {qkv // 2}  # of 4 heads' queries, 2 keys and 2 values


def test_full_depth_saves_and_costs_nothing(model: OpenedModel) -> None:
    savings = _decode(model, [[1, 2, 3], [4, 5]], ExitParams(mode="full"))
    assert (savings.bytes_not_read, savings.head_bytes, savings.num_asked) == (0, 0, 0)
    assert (savings.arithmetic_saved, savings.head_arithmetic) == (0, 0)


def test_positions_that_wait_at_the_end_are_the_arithmetic_saved(model: OpenedModel) -> None:
    """Alone, and all tokens leave at 2: three positions of the prompt and five of the answer never go deeper."""
    savings = _decode(model, [[1, 2, 3]], ExitParams(threshold=0.0))
    assert savings.share_not_read == pytest.approx(0.75)
    assert savings.arithmetic_saved == pytest.approx(0.75)
    assert savings.num_asked >= 6


def test_a_catch_up_reads_weights_for_no_token(model: OpenedModel) -> None:
    """With a limit of one pending position, a pass over the pending ones follows every other token."""
    few, many = (_decode(model, [[1]], ExitParams(threshold=0.0, max_pending=limit)) for limit in (1, 100))
    assert many.share_not_read == pytest.approx(0.75)
    assert few.share_not_read == pytest.approx(0.75 - 0.75 * 2 / 6)  # after the second and the fourth of six
    assert few.arithmetic_saved < many.arithmetic_saved


@pytest.mark.parametrize("layer", [2, 5])
def test_drafts_read_less_where_they_are_right(model: OpenedModel, layer: int) -> None:
    """Beside full depth, which reads all layers for each token; every position that is kept runs all of them once."""
    drafting = ExitParams(mode="speculative", draft_exit=layer, draft_length=3)
    llm = LLM.of(model, tiny_config())
    before = llm.work
    (text,) = llm.generate([1, 2, 3], SamplingParams(max_new_tokens=9), drafting)
    work = llm.work - before
    savings = savings_of(work, model.facts.weights, num_tokens=9)
    size = sum(model.facts.weights.layers) // 8
    read = sum(count * (stop - start) for (start, stop), count in work.launches.items())
    assert (savings.bytes_at_full_depth, savings.bytes_not_read) == (9 * 8 * size, (9 * 8 - read) * size)
    assert savings.arithmetic_saved == pytest.approx(-work.taken_back / (3 + 9 - 1))
    assert work.taken_back == sum(emission.discarded for emission in text.emissions)
