"""What simulations say of pipelines that no machine at hand has: orders of exits, layouts, many stages, fills."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from bench_report import Measure, measure_of

from megatron_ee.config import Config, ExitsConfig, ModelConfig, ParallelConfig, StagePlacement
from megatron_ee.parallel.chunks import Layout, have_exits
from megatron_ee.parallel.costs import ModelCosts, chunk_costs, estimated_costs
from megatron_ee.parallel.layout import place
from megatron_ee.parallel.pipeline.fill_planner import plan_fills
from megatron_ee.parallel.pipeline.plan import Fill
from megatron_ee.parallel.pipeline.schedules import Pipeline, build_plan
from megatron_ee.parallel.pipeline.simulate import StageCosts, simulate
from megatron_ee.parallel.pipeline.timeline import Timeline

# What decides layouts; GPT-2's two matrices of an MLP are two thirds of as wide a SwiGLU's three.
MODELS: Mapping[str, ModelConfig] = {
    "ee_llm_1.3b": ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16, vocab_size=50304),
    "llama_2_7b": ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=32000
    ),
    "llama_3_8b": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        ffn_hidden_size=14336,
        vocab_size=128256,
    ),
    "llama_3.2_1b": ModelConfig(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        ffn_hidden_size=8192,
        vocab_size=128256,
    ),
    "gpt2_small": ModelConfig(
        num_layers=12, hidden_size=768, num_attention_heads=12, ffn_hidden_size=2048, vocab_size=50304
    ),
}
SEQUENCE_LENGTH = 2048
BEST_CASE = 1.03  # how much longer than the ratio of work a step may be


@dataclass(frozen=True, slots=True)
class LargeSizes:
    """A pipeline that is only simulated."""

    num_stages: int = 64
    num_microbatches: int = 256
    layers_per_stage: int = 4


def exit_order_measures(num_microbatches: int = 8, head: float = 0.5) -> list[Measure]:
    """A step with exits on all stages over one without early exits. F = 1, B = 2, a head takes `head` and twice it."""
    measures = []
    for stages in (4, 8):
        without = _step(stages, num_microbatches, (1, 3 * head, 2), early=False)
        orders = {
            "exits_apart": (1, 3 * head, 2),
            "inside_forward_and_backward": (1 + head, 0, 2 + 2 * head),
            "ee_llm": (1, head, 2 + 2 * head),  # the head's forward while waiting, its backward in B
        }
        ratios = {name: _step(stages, num_microbatches, order) / without for name, order in orders.items()}
        context = {"stages": stages, "microbatches": num_microbatches, "head_over_stage_forward": head} | ratios
        measures.append(exact(f"step_ratio_exits_p{stages}_simulated", ratios["exits_apart"], "lower", context, 1.005))
    return measures


def layout_measures(stages: int = 4, num_microbatches: int = 16) -> list[Measure]:
    """Of each model: a step of the best layout with exits at 1/4 and 1/2 of its depth over one of the best without."""
    measures = []
    for name, model in MODELS.items():
        costs, exits = _estimated(model)
        both, parallel = _with_and_without(exits), ParallelConfig(pipeline=stages)
        layouts = {key: place(model, chosen, parallel, costs) for key, chosen in both.items()}
        steps = {key: run("1f1b", layout, costs, num_microbatches).makespan for key, layout in layouts.items()}
        work = {key: sum(chunk_costs(layout, exits, costs).totals) for key, layout in layouts.items()}
        work_ratio = work["with"] / work["without"]
        context = {
            "stages": stages,
            "microbatches": num_microbatches,
            "exits": list(exits.layers),
            "head_in_layers": costs.exits["norm"] / costs.layer,
            "work_ratio": work_ratio,
            "layers_with": _num_layers(layouts["with"]),
            "layers_without": _num_layers(layouts["without"]),
            "step_with_in_layers": steps["with"] / costs.layer,
            "step_without_in_layers": steps["without"] / costs.layer,
        }
        goal = round(BEST_CASE * max(1, work_ratio), 4)
        measures.append(exact(f"best_layout_ratio_{name}", steps["with"] / steps["without"], "lower", context, goal))
    return measures


def balance_measures() -> list[Measure]:
    """Of each model: the slowest of 8 stages, laid out by cost over equal layers; 4 stages beside it."""
    measures = []
    for name, model in MODELS.items():
        costs, exits = _estimated(model)
        slowest = {}
        for stages, (key, chosen) in product((4, 8), _with_and_without(exits).items()):
            for layout, parallel in (
                ("auto", ParallelConfig(pipeline=stages)),
                ("equal", equal_layers(model.num_layers, stages)),
            ):
                totals = chunk_costs(place(model, chosen, parallel, costs), chosen, costs).totals
                slowest[f"{layout}_p{stages}_{key}_exits"] = max(totals) / costs.layer
        ratio = slowest["auto_p8_with_exits"] / slowest["equal_p8_with_exits"]
        context = {"exits": list(exits.layers), "slowest_in_layers": slowest}
        measures.append(exact(f"auto_over_equal_layers_{name}", ratio, "lower", context, 1.0))
    return measures


def large_measures(sizes: LargeSizes, costs: ModelCosts) -> list[Measure]:
    """From measured durations: a step of many stages, with exits at 1/4 and 1/2 of the depth and without.

    The model fills its stages evenly: where the embedding and the heads are, layers make room.
    """
    stages, microbatches = sizes.num_stages, sizes.num_microbatches
    head = costs.exits["norm"] / costs.layer
    embedding = costs.embedding / costs.layer
    spare = math.ceil(embedding) + 3 * (math.ceil(head) + 1)  # exits seldom are where whole layers would end a stage
    num_layers = max(2 * stages, sizes.layers_per_stage * stages - spare)
    model = ModelConfig(num_layers=num_layers, hidden_size=64, num_attention_heads=1)  # costs are given
    both = _with_and_without(ExitsConfig(layers=(num_layers // 4, num_layers // 2)))
    shared = {
        "stages": stages,
        "microbatches": microbatches,
        "layers": num_layers,
        "head_in_layers": head,
        "embedding_in_layers": embedding,
        "transfer_in_layers": costs.transfer / costs.layer,
    }
    measures = []
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2)):
        parallel = ParallelConfig(pipeline=stages, chunks=chunks)
        layouts = {key: place(model, exits, parallel, costs) for key, exits in both.items()}
        lines = {key: run(schedule, layout, costs, microbatches) for key, layout in layouts.items()}
        work_ratio = sum(lines["with"].busy) / sum(lines["without"].busy)
        context = shared | {"chunks": chunks, "over_ideal": over_ideal(lines["with"]), "work_ratio": work_ratio}
        context |= {"over_ideal_without": over_ideal(lines["without"])}
        prefix = f"simulated_p{stages}"
        measures += [
            exact(f"{prefix}_bubble_{schedule}", lines["with"].bubble_fraction, "lower", context),
            exact(
                f"{prefix}_exits_ratio_{schedule}", lines["with"].makespan / lines["without"].makespan, "lower", context
            ),
        ]
        if chunks == 1:
            filled = fill_measures(prefix, layouts["with"], costs, lines["with"], microbatches, shared)
    return measures + filled


def fill_measures(
    prefix: str, layout: Layout, costs: ModelCosts, unfilled: Timeline, num_microbatches: int, shared: dict[str, Any]
) -> list[Measure]:
    """How much of a pipeline's idle time fills use, and how much more work a step then does."""
    pipeline = Pipeline(len(layout), num_microbatches, tuple(have_exits(layout)))
    durations = chunk_costs(layout, ExitsConfig(), costs)
    fills = plan_fills(pipeline, durations.per_stage, transfer=costs.transfer)
    filled = run("filled-1f1b", layout, costs, num_microbatches, fills)
    context = shared | fill_context(pipeline, fills, unfilled, filled)
    return [
        exact(f"{prefix}_bubble_filled", filled.bubble_fraction, "lower", context),
        exact(f"{prefix}_fill_gain", context["pieces_gained"], "higher", context),
    ]


def filled_gain_measures(forward: float = 1.0, head: float = 0.5) -> list[Measure]:
    """Share of the idle time that fills use, with equal stages and 2 P micro-batches; B = 2 F."""
    measures = []
    for stages in (4, 8):
        costs = StageCosts((forward,) * stages, (3 * head * forward,) * stages, (2 * forward,) * stages)
        pipeline = Pipeline(stages, 2 * stages, (True,) * stages)
        fills = plan_fills(pipeline, costs)
        lines = []
        for schedule, own in (("1f1b", ()), ("filled-1f1b", fills)):
            plan = build_plan(
                schedule,
                num_stages=stages,
                num_microbatches=2 * stages,
                has_exits=pipeline.has_exits,
                fills=own,
            )
            lines.append(simulate(plan, costs))
        context = fill_context(pipeline, fills, *lines)
        measures.append(exact(f"filled_gain_p{stages}", context["idle_time_used"], "higher", context))
    return measures


def fill_context(pipeline: Pipeline, fills: Sequence[Fill], unfilled: Timeline, filled: Timeline) -> dict[str, Any]:
    """What fills do for a step."""
    trained = sum(fill.trains(stage) for fill in fills for stage in range(pipeline.num_stages))
    idle = [line.bubble_fraction * line.makespan for line in (unfilled, filled)]
    return {
        "fills": len(fills),
        "pieces_gained": trained / (pipeline.num_stages * pipeline.num_microbatches),
        "idle_time_used": 1 - idle[1] / idle[0],
        "bubble_unfilled": unfilled.bubble_fraction,
        "bubble_filled": filled.bubble_fraction,
        "step_ratio": filled.makespan / unfilled.makespan,
    }


def run(
    schedule: str, layout: Layout, costs: ModelCosts, num_microbatches: int, fills: Sequence[Fill] = ()
) -> Timeline:
    """One step of a layout whose exits are all of one kind."""
    plan = build_plan(
        schedule,
        num_stages=len(layout),
        num_chunks=len(layout[0]),
        num_microbatches=num_microbatches,
        has_exits=have_exits(layout),
        fills=fills,
    )
    return simulate(plan, chunk_costs(layout, ExitsConfig(), costs), transfer=costs.transfer)


def over_ideal(line: Timeline) -> float:
    """A step over what it would take with all its work spread evenly and no stage idle."""
    return line.makespan * len(line.busy) / sum(line.busy)


def equal_layers(num_layers: int, stages: int) -> ParallelConfig:
    """The layout that people write by hand."""
    least, left_over = divmod(num_layers, stages)
    counts = [least + (stage < left_over) for stage in range(stages)]
    return ParallelConfig(pipeline=stages, layout=tuple(StagePlacement(layers=count) for count in counts))


def exact(name: str, value: float, better: Any, context: dict[str, Any], goal: float | None = None) -> Measure:
    """What has no noise."""
    return measure_of(name, [value], better, 1.0, context, goal)


def _step(stages: int, num_microbatches: int, durations: tuple[float, float, float], *, early: bool = True) -> float:
    """Length of 1F1B on equal stages; the last one has the final exit."""
    forward, exits, backward = durations
    costs = StageCosts((forward,) * stages, (exits,) * stages, (backward,) * stages)
    has_exits = [early] * (stages - 1) + [True]
    plan = build_plan("1f1b", num_stages=stages, num_microbatches=num_microbatches, has_exits=has_exits)
    return simulate(plan, costs).makespan


def _with_and_without(exits: ExitsConfig) -> dict[str, ExitsConfig]:
    return {"without": ExitsConfig(), "with": exits}


def _estimated(model: ModelConfig) -> tuple[ModelCosts, ExitsConfig]:
    """A model's costs, and its exits at 1/4 and 1/2 of the depth."""
    assert isinstance(model.vocab_size, int)
    exits = ExitsConfig(layers=(model.num_layers // 4, model.num_layers // 2))
    return estimated_costs(_config(model), model.vocab_size), exits


def _num_layers(layout: Layout) -> list[int]:
    return [sum(chunk.stop - chunk.start for chunk in chunks) for chunks in layout]


def _config(model: ModelConfig) -> Config:
    return Config.model_validate(
        {
            "name": "bench",
            "model": model.model_dump(),
            "data": {"sequence_length": SEQUENCE_LENGTH},
            "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )
