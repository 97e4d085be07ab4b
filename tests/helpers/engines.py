"""Engines in tests: loads of every mode, and what must never be left behind."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helpers.decoding import request
from helpers.tiny import VOCAB_SIZE
from megatron_ee.config import ExitParams, SchedulingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.ring import Pipeline
from megatron_ee.inference.scheduling.strategies.named import make_planner, make_stage_planner
from megatron_ee.inference.stages import Stages

STRATEGIES = ["lockstep", "compaction", "rebatch"]
CAPACITY = 64
MODES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": 0.05},
    {"threshold": 0.04, "kv_policy": "fill", "max_pending": 3},
    {"thresholds": {2: 0.06, 5: 0.02}, "kv_policy": "propagate"},
    {"exits": (5,), "threshold": 0.05, "measure": "margin"},
    {"mode": "speculative", "draft_exit": 2, "draft_length": 3},
    {"mode": "speculative", "kv_policy": "fill"},
    {"mode": "sled"},
    {"mode": "dola", "dola": {"layers": (5,)}},
]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.3}]


def engine_of(
    model: OpenedModel,
    strategy: str,
    *,
    residents: int,
    chunk: int = 8,
    blocks: Blocks | None = None,
    whole: bool = True,
    keeps_prefixes: bool = False,
    stops: Sequence[int] = (),
    recorder: Recorder | None = None,
    **scheduling: Any,
) -> Engine:
    """
    Args:
        stops: where stages end, of a pipeline in this process; none: there is none.
        recorder: of its launches.
    """
    if stops:
        model = replace(model, pipeline=Pipeline(Stages(tuple(stops)), model.facts))
    params = SchedulingParams.model_validate({"strategy": strategy, **scheduling})
    batch = Batch(
        model,
        slots=residents,
        capacity=CAPACITY,
        prefill_chunk=chunk,
        blocks=blocks,
        keeps_prefixes=keeps_prefixes,
    )
    costs, depths = model.launch_costs, model.depths
    if model.pipeline is not None:
        stage_planner = make_stage_planner(
            params, costs, model.stages, depths, residents=residents, prefill_chunk=chunk
        )
        return Engine(batch, stage_planner, whole=whole, recorder=recorder)
    planner = make_planner(params, costs, depths, residents=residents, prefill_chunk=chunk)
    return Engine(batch, planner, whole=whole)


def requests_of(seed: int, count: int, *, longest: int = 12) -> list[Request]:
    """Many of whose prompts begin alike."""
    numbers = random.Random(seed)
    common = [numbers.randrange(VOCAB_SIZE) for _ in range(20)]
    return [
        request(
            common[: numbers.choice([0, 4, 9, 16])]
            + [numbers.randrange(VOCAB_SIZE) for _ in range(numbers.choice([1, 3, 5, 16]))],
            ExitParams.model_validate(numbers.choice(MODES)),
            max_new_tokens=numbers.randint(1, longest),
            seed=numbers.randrange(1000),
            **numbers.choice(SAMPLING),
        )
        for _ in range(count)
    ]


def said(text: Sequence[Emission]) -> list[tuple[int, int]]:
    return [(emission.token, emission.exit_layer) for emission in text]


def assert_nothing_is_left(engine: Engine, residents: int) -> None:
    walk = engine.batch.walk
    assert engine.is_idle and engine.num_waiting == 0
    assert engine.batch.free_slots == residents
    assert engine.batch.fronts() == []
    assert walk.blocks.num_free == walk.blocks.num_positions
    assert all(not walk.blocks.of(slot) for slot in range(residents))
    kept = [block for block in range(walk.blocks.num_blocks) if walk.prefixes is not None and block in walk.prefixes]
    for attention in walk.cache.windows:
        room = walk.cache.of(attention)[..., : walk.blocks.num_positions, :].unflatten(3, (-1, walk.blocks.size))
        of_nobody = [block for block in range(walk.blocks.num_blocks) if block not in kept]
        assert not room[:, :, :, of_nobody].any(), "keys and values of nobody"
        assert not walk.cache.of(attention)[..., walk.blocks.num_positions :, :].any()


def assert_blocks_and_ledger_agree(engine: Engine) -> None:
    """At most one owner for each block; of every sequence all positions that have run have a place."""
    walk, inside = engine.batch.walk, {front.slot for front in engine.batch.fronts()}
    taken = [block for slot in range(walk.blocks.slots) for block in walk.blocks.of(slot)]
    assert len(taken) == len(set(taken)) == walk.blocks.num_blocks - walk.blocks.num_free // walk.blocks.size
    for slot in inside:
        assert walk.ledger.length(slot) <= walk.blocks.room(slot)
    assert all(not walk.blocks.of(slot) for slot in range(walk.blocks.slots) if slot not in inside)
