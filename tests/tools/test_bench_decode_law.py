"""The law of self-speculation, against what one computes by hand, and against what batches run; and Hugging Face's own,
which the bench sets beside it.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoding import decode, opened, request
from helpers.drafts import weaken
from helpers.models import whole_model

from megatron_ee.config import ExitParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.request import Emission
from megatron_ee.parallel.mesh import Mesh

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def law(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("bench_decode_law")


def line(first: float, more: float = 0.0) -> tuple[tuple[int, float], ...]:
    """Seconds of one row, and what each more adds."""
    return (1, first), (2, first + more)


def said(text: str) -> list[Emission]:
    """A letter for each token: d is drafted, a figure is full depth's, after so many that it discarded."""
    return [Emission(0, 8, 1.0, draft_exit=2) if of == "d" else Emission(0, 8, 1.0, discarded=int(of)) for of in text]


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_cycle_of_one_sequence_obeys_the_law(law: Any, length: int) -> None:
    shallow, head, deep, final, row, word = 2.0, 3.0, 6.0, 3.5, 0.5, 0.25
    costs = law.CycleCosts(line(shallow), line(head), line(deep, row), line(final, word))
    verified = deep + length * row + final + length * word
    assert costs.cycle([length]) == length * (shallow + head) + shallow + verified


def test_sequences_draft_together_as_long_as_any_does(law: Any) -> None:
    costs = law.CycleCosts(line(1.0, 0.1), line(10.0, 1.0), line(100.0, 2.0), line(1000.0, 4.0))
    # three rows, then two, then one; three rows without a head; 0 + 1 + 3 drafted ones and three more
    drafting = (1.1 + 11.0) + (1.0 + 10.0) + (1.0 + 10.0)
    assert costs.cycle([0, 1, 3]) == pytest.approx(drafting + 1.2 + (100 + 6 * 2) + (1000 + 6 * 4))


def test_cycles_are_read_off_the_tokens(law: Any) -> None:
    answers = law.Answers.of([said("0ddd02d1"), said("0d10")])
    assert answers.drafted == ((3, 2, 2), (2, 0))
    assert (answers.accepted, answers.refused) == (5, 3)
    assert answers.acceptance == 5 / 8
    assert (answers.drafted_per_cycle, answers.tokens_per_cycle) == (9 / 5, 2)
    assert answers.cycles([2, 2, 5]) == [law.Cycle(2, (3, 2)), law.Cycle(2, (2, 0)), law.Cycle(5, (2,))]


def test_full_depth_is_cycles_without_drafts(law: Any) -> None:
    plain = law.CycleCosts(line(1.0, 0.5), line(10.0), line(100.0, 2.0), line(1000.0))
    costs = law.SpeculationCosts(7.0, {2: {0: plain}})
    together = 2 * (1.5 + 102 + 1000) + 2 * (1 + 100 + 1000)
    assert costs.full([5, 3]) == pytest.approx(7 + together)


def test_every_cycle_costs_what_its_own_length_does(law: Any) -> None:
    free = line(0.0)
    cycles = {2: {length: law.CycleCosts(free, free, free, line(10.0**length)) for length in range(4)}}
    costs = law.SpeculationCosts(0.5, cycles)
    assert costs.law([law.Cycle(2, (3,)), law.Cycle(2, (1,)), law.Cycle(2, (1, 0))]) == 0.5 + 1000 + 10 + 10


@pytest.mark.parametrize("prompts", [[3], [3, 5, 1]], ids=["alone", "together"])
def test_batches_run_the_launches_and_rows_of_the_law(law: Any, mesh: Mesh, prompts: list[int]) -> None:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64)
    weaken(stage, after=2, factor=0.4)
    batch = Batch(opened(stage), slots=len(prompts), capacity=32)
    params = ExitParams(mode="speculative", draft_exit=5, draft_length=3)
    texts = decode(batch, [request(range(1, length + 1), params) for length in prompts])
    answers = law.Answers.of(texts)
    assert answers.accepted > 0 and answers.refused > 0
    steps = answers.cycles([5] * max(map(len, answers.drafted)))
    assert counted(law, steps, line(1.0)) == launches(batch, (0, 5))
    assert counted(law, steps, line(1.0, 1.0)) == rows(batch, (0, 5))
    assert verified(law, steps, line(1.0)) == launches(batch, (5, 8))
    assert verified(law, steps, line(1.0, 1.0)) == rows(batch, (5, 8))


def counted(law: Any, steps: Any, shallow: Any) -> float:
    nothing = line(0.0)
    return sum(law.CycleCosts(shallow, nothing, nothing, nothing).cycle(step.drafted) for step in steps)


def verified(law: Any, steps: Any, deep: Any) -> float:
    nothing = line(0.0)
    return sum(law.CycleCosts(nothing, nothing, deep, nothing).cycle(step.drafted) for step in steps)


def launches(batch: Batch, segment: tuple[int, int]) -> int:
    return batch.walk.work.launches[segment]


def rows(batch: Batch, segment: tuple[int, int]) -> int:
    return batch.walk.work.rows[segment]
