"""`LLM` on a pipeline: every process makes the same calls and gets the same texts."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.saved import save_random_run

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.errors import UserError
from megatron_ee.inference.llm import LLM
from megatron_ee.inference.work import Work
from megatron_ee.parallel.mesh import Mesh

PROMPTS = ["early", "a token leaves", "deep"]
SETTINGS = [
    ExitParams(threshold=0.012, kv_policy="fill"),
    ExitParams(mode="speculative", draft_exit=2, draft_length=3),
    ExitParams(threshold=0.02),
]


def _decode(run: Path, overrides: list[str]) -> dict[str, Any]:
    llm = LLM(run, overrides=["device=cpu", "inference.max_batch_size=2", *overrides])
    sampling = SamplingParams(max_new_tokens=12)
    whole = llm.generate(PROMPTS, sampling, SETTINGS)
    broken = [piece.emission.token for piece in islice(llm.stream(PROMPTS, sampling, SETTINGS), 7)]
    again = llm.generate(PROMPTS, sampling, SETTINGS)
    return {
        "texts": [(of.text, of.tokens, of.exit_layers, of.finish_reason) for of in whole],
        "again": [of.tokens for of in again],
        "broken": len(broken),
        "is_first": llm.is_first,
        "from_first": llm.from_first(lambda: "said once"),
        "work": llm.work,
    }


def test_every_process_gets_the_texts_of_one(tmp_path: Path, mesh: Mesh, ranks: RankPool) -> None:
    save_random_run(tmp_path / "run", mesh, layers=[2, 5])
    (alone,) = ranks.run(1, _decode, tmp_path / "run", [])
    served = ranks.run(3, _decode, tmp_path / "run", ["inference.parallel.pipeline=3"])
    assert [of["is_first"] for of in served] == [True, False, False]
    for of in served:
        assert of["texts"] == alone["texts"]
        assert of["again"] == [tokens for _, tokens, _, _ in alone["texts"]], "what was broken off left nothing behind"
        assert (of["broken"], of["from_first"]) == (7, "said once")
    works: list[Work] = [of["work"] for of in served]
    assert works[0] == works[1] == works[2]
    assert sum(works[0].projections.values()) > 0


def _open(run: Path, overrides: list[str]) -> str:
    try:
        LLM(run, overrides=["device=cpu", *overrides])
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["inference.parallel.pipeline=3"], "inference.parallel.pipeline: 2 processes don't divide into 3 stages"),
        (
            ["inference.parallel.pipeline=2", "inference.parallel.layout=[1,2]"],
            "inference.parallel.layout: ",
        ),
    ],
)
def test_what_does_not_fit_is_one_message_on_all(
    tmp_path: Path, mesh: Mesh, ranks: RankPool, overrides: list[str], said: str
) -> None:
    save_random_run(tmp_path / "run", mesh, layers=[2, 5])
    for of in ranks.run(2, _open, tmp_path / "run", overrides):
        assert said in of
