"""Losses, every gradient, the norm and one optimizer step of a split model equal those of one autograd over an
independent model in one process (fp32)."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers.one_step import assert_equals_reference, one_step
from helpers.ranks import RankPool
from helpers.tiny import tiny_config

from megatron_ee.config import Config


def _equal(parts: int, layers: int = 8) -> list[dict[str, Any]]:
    return [{"layers": layers // parts} for _ in range(parts)]


def _two_stages(left_end: bool, right_start: bool) -> list[dict[str, Any]]:
    return [{"layers": 4, "exits_at_end": left_end}, {"layers": 4, "exits_at_start": right_start}]


_SEQUENCE = {"tensor": 2, "sequence": True}
_CHUNKS = {"chunks": 2, "schedule": "interleaved"}
_LARGER = {"micro_batch_size": 2}  # tensor-parallel ranks wait for each other in every layer of every micro-batch
_ZERO_BUBBLE = {"pipeline": 2, "schedule": "zero-bubble"}
_PINNED = [
    {"layers": 2, "exits_at_end": False},
    {"layers": 2, "exits_at_start": True},
    {"layers": 2},
    {"layers": 2},
]


@dataclass(frozen=True)
class Case:
    """Exits after `exits`, on `data` pipelines of as many stages as `parallel` says, of equal layers unless it has a
    layout."""

    name: str
    exits: list[int]
    parallel: dict[str, Any]
    data: int = 1
    projection: str | list[str] = "shared"
    head: str | list[str] = "norm"
    release: bool = False
    loss_chunk_rows: int = 5
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1

    @property
    def world_size(self) -> int:
        return self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1) * self.data

    def config(self) -> Config:
        parts = self.parallel.get("pipeline", 1) * self.parallel.get("chunks", 1)
        names = ("projection", "head", "release", "loss_chunk_rows")
        return tiny_config(
            exits={"layers": self.exits, **{name: getattr(self, name) for name in names}},
            parallel={"layout": _equal(parts), "data": self.data, **self.parallel},
            model=self.model,
            training={**(_LARGER if "tensor" in self.parallel else {}), **self.training},
            optimizer={"epsilon": 1e-3},  # or a first step of AdamW shows no more than signs
        )


CASES = [
    Case("one process", [2, 5], {}),
    Case("one process, own projections", [2, 5], {}, projection="own"),
    Case("exit in the middle of each stage", [2, 6], {"pipeline": 2}),
    Case("two exits on one stage", [1, 3], {"pipeline": 2}),
    Case("exit at the end of a stage", [4], {"pipeline": 2}),
    Case("exit at the start of a stage", [4], {"pipeline": 2, "layout": _two_stages(False, True)}),
    Case("exits only in the last stage", [5, 7], {"pipeline": 2}),
    Case("no early exits", [], {"pipeline": 2}),
    Case("unequal stages", [3, 6], {"pipeline": 2, "layout": [{"layers": 5}, {"layers": 3}]}),
    Case("own projections", [2, 4, 7], {"pipeline": 2}, projection="own"),
    Case("gpipe", [2, 4, 6], {"pipeline": 2, "schedule": "gpipe"}),
    Case("two pipelines", [2, 4, 6], {"pipeline": 2}, data=2),
    Case("data parallel alone", [3], {}, data=2),
    Case("four stages, one without exits", [2, 4, 7], {"pipeline": 4}),
    Case("four stages, own projections", [1, 2, 5], {"pipeline": 4}, projection="own"),
    Case("four stages, exit on every layer", [1, 2, 3, 4, 5, 6, 7], {"pipeline": 4}),
    Case("tensor parallel", [2, 5], {"tensor": 2}),
    Case("tensor parallel, own projections", [2, 5], {"tensor": 2}, projection="own"),
    Case("sequence parallel", [2, 5], {"tensor": 2, "sequence": True}),
    Case("tensor and pipeline", [2, 4, 7], {"tensor": 2, "pipeline": 2}),
    Case("sequence and pipeline, own projections", [2, 4], {**_SEQUENCE, "pipeline": 2}, projection="own"),
    Case("tensor and data", [3], {"tensor": 2}, data=2),
    Case("two chunks", [1, 4, 5], {"pipeline": 2, **_CHUNKS}),
    Case("two chunks, exit on every layer", [1, 2, 3, 4, 5, 6, 7], {"pipeline": 2, **_CHUNKS}),
    Case("two chunks, exits at both sides of borders", [2, 4, 6], {"pipeline": 2, **_CHUNKS, "layout": _PINNED}),
    Case("two chunks, own projections", [2, 4, 6], {"pipeline": 2, **_CHUNKS}, projection="own"),
    Case("two chunks, no early exits", [], {"pipeline": 2, **_CHUNKS}),
    Case("four chunks", [1, 5], {"pipeline": 2, "chunks": 4, "schedule": "interleaved"}),
    Case("four stages of two chunks", [2, 3, 6], {"pipeline": 4, **_CHUNKS}),
    Case("two chunks, tensor parallel", [2, 4, 5], {**_SEQUENCE, "pipeline": 2, **_CHUNKS}),
    Case("two chunks, two pipelines", [2, 4, 5], {"pipeline": 2, **_CHUNKS}, data=2),
    Case("distributed optimizer, one data rank", [2, 5], {"pipeline": 2, "distributed_optimizer": True}),
    Case("all logits at once", [2, 5], {"pipeline": 2}, loss_chunk_rows=0),
    Case("all logits at once, tensor parallel", [2, 5], _SEQUENCE, loss_chunk_rows=0),
    Case("exits just before their backward", [2, 4, 7], {"pipeline": 2}, release=True),
    Case("exits just before their backward, chunks", [2, 4, 7], {"pipeline": 2, **_CHUNKS}, release=True),
    Case("each exit another head", [2, 4, 6], {"pipeline": 2}, head=["mlp", "block", "norm"]),
    Case("each exit another projection", [2, 4, 6], {"pipeline": 2}, projection=["own", "shared", "own"]),
    Case("tied, exits on the first stage only", [1, 3], {"pipeline": 2}, model={"tie_embeddings": True}),
    Case("tied, a stage without exits", [2, 7], {"pipeline": 4}, model={"tie_embeddings": True}),
    Case("tied, own projections", [2, 5], {"pipeline": 2}, projection="own", model={"tie_embeddings": True}),
    Case("tied, two chunks", [1, 3, 5], {"pipeline": 2, **_CHUNKS}, model={"tie_embeddings": True}),
    Case("an MLP at the end of a stage", [4], {"pipeline": 2}, head="mlp"),
    Case("a block at the start of a stage", [4], {"pipeline": 2, "layout": _two_stages(False, True)}, head="block"),
    Case("zero bubble, two stages", [2, 4, 7], _ZERO_BUBBLE),
    Case("zero bubble, four stages", [2, 4, 7], {**_ZERO_BUBBLE, "pipeline": 4}),
    Case("zero bubble, no early exits", [], _ZERO_BUBBLE),
    Case("zero bubble, each exit another head", [2, 4, 6], _ZERO_BUBBLE, head=["mlp", "block", "norm"]),
    Case("zero bubble, exits just before their backward", [2, 4, 7], _ZERO_BUBBLE, release=True),
    Case("zero bubble, tied", [2, 5], {**_ZERO_BUBBLE, "pipeline": 4}, model={"tie_embeddings": True}),
    Case("zero bubble, two pipelines", [2, 4], _ZERO_BUBBLE, data=2, repeats=2),
]

# What other cases, here and in test_exit_objectives.py, test_layerskip_gradients.py and test_todays_models.py, hold in
# all its parts: with the long sweeps.
IN_PARTS = {
    "one process, own projections",
    "two exits on one stage",
    "exits only in the last stage",
    "no early exits",
    "own projections",
    "four stages, own projections",
    "four stages, exit on every layer",
    "tensor parallel",
    "tensor parallel, own projections",
    "tensor and pipeline",
    "tensor and data",
    "sequence parallel",
    "two chunks",
    "two chunks, exit on every layer",
    "two chunks, tensor parallel",
    "two chunks, own projections",
    "two chunks, no early exits",
    "two chunks, two pipelines",
    "four stages of two chunks",
    "all logits at once",
    "tied, a stage without exits",
    "an MLP at the end of a stage",
    "a block at the start of a stage",
    "zero bubble, no early exits",
    "zero bubble, tied",
    "zero bubble, two pipelines",
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"parallel": {"tensor": 2}},
    "PP2": {"parallel": {"pipeline": 2}},
    "DP2": {"parallel": {}, "data": 2},
    "TP2xPP2": {"parallel": {"tensor": 2, "pipeline": 2}},
    "PP2xDP2": {"parallel": {"pipeline": 2}, "data": 2},
    "PP2 v2": {"parallel": {"pipeline": 2, **_CHUNKS}},
    "TP2+SPxPP2": {"parallel": {**_SEQUENCE, "pipeline": 2}},
    "full recomputation": {"parallel": {"pipeline": 2}, "training": {"recompute": "full"}},
    "full recomputation, SP": {"parallel": _SEQUENCE, "training": {"recompute": "full"}},
    "selective recomputation": {
        "parallel": {"pipeline": 2},
        "training": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    },
    "distributed optimizer": {"parallel": {"pipeline": 2, "distributed_optimizer": True}, "data": 2},
    "distributed optimizer, TP": {"parallel": {"tensor": 2, "distributed_optimizer": True}, "data": 2},
    "overlap": {"parallel": {"pipeline": 2, "overlap_grad_reduce": True}, "data": 2, "repeats": 2},
    "overlap, distributed optimizer, v2": {
        "parallel": {"pipeline": 2, **_CHUNKS, "overlap_grad_reduce": True, "distributed_optimizer": True},
        "data": 2,
        "repeats": 2,
    },
    "zero bubble": {"parallel": _ZERO_BUBBLE},
    "zero bubble, TP": {"parallel": {**_ZERO_BUBBLE, "tensor": 2}},
    "zero bubble, SP": {"parallel": {**_ZERO_BUBBLE, **_SEQUENCE}},
    "zero bubble, full recomputation": {"parallel": _ZERO_BUBBLE, "training": {"recompute": "full"}},
    "zero bubble, full recomputation, SP": {
        "parallel": {**_ZERO_BUBBLE, **_SEQUENCE},
        "training": {"recompute": "full"},
    },
    "zero bubble, selective recomputation": {
        "parallel": _ZERO_BUBBLE,
        "training": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    },
    "zero bubble, distributed optimizer": {"parallel": {**_ZERO_BUBBLE, "distributed_optimizer": True}, "data": 2},
    "zero bubble, overlap": {"parallel": {**_ZERO_BUBBLE, "overlap_grad_reduce": True}, "data": 2, "repeats": 2},
    "zero bubble, overlap, distributed optimizer": {
        "parallel": {**_ZERO_BUBBLE, "overlap_grad_reduce": True, "distributed_optimizer": True},
        "data": 2,
        "repeats": 2,
    },
    "megatron": {"parallel": {"pipeline": 2, "schedule": "megatron"}},
    "megatron v2": {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "megatron"}},
    "megatron, one stage": {"parallel": {"schedule": "megatron"}},
    "megatron, overlap": {
        "parallel": {"pipeline": 2, "schedule": "megatron", "overlap_grad_reduce": True},
        "data": 2,
        "repeats": 2,
    },
}

EXITS: dict[str, dict[str, Any]] = {
    "shared, tied": {"model": {"tie_embeddings": True}},
    "shared, untied": {},
    "own": {"projection": "own"},
    "MLP": {"head": "mlp"},
    "block": {"head": "block"},
}

TABLE = [
    Case(f"{layout_name} x {exits_name}", [2, 4, 7], **layout, **exits)
    for layout_name, layout in LAYOUTS.items()
    for exits_name, exits in EXITS.items()
]
# Of each layout that no case above or in one of those files holds in all its parts, one runs in every test run, with
# all kinds of exits in turn; the others with the long sweeps.
IN_PARTS_ELSEWHERE = {
    "full recomputation",
    "full recomputation, SP",
    "selective recomputation",
    "distributed optimizer",
    "distributed optimizer, TP",
    "overlap",
    "overlap, distributed optimizer, v2",
    "zero bubble, full recomputation, SP",
    "zero bubble, overlap",
    "megatron, one stage",
}
SAMPLE = [
    TABLE[number * len(EXITS) + number % len(EXITS)]
    for number, name in enumerate(LAYOUTS)
    if any(word in name for word in ("recomputation", "distributed", "overlap", "megatron"))
    and name not in IN_PARTS_ELSEWHERE
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case.name in IN_PARTS else []) for case in CASES],
    ids=lambda case: case.name,
)
def test_equals_one_autograd_over_the_whole_model(case: Case, ranks: RankPool) -> None:
    _check(case, ranks)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_layouts_and_exits(case: Case, ranks: RankPool) -> None:
    _check(case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in TABLE if case not in SAMPLE], ids=lambda case: case.name)
def test_all_layouts_and_exits(case: Case, ranks: RankPool) -> None:
    _check(case, ranks)


def _check(case: Case, ranks: RankPool) -> None:
    config = case.config()
    assert_equals_reference(config, ranks.run(case.world_size, one_step, config, None, case.repeats))
