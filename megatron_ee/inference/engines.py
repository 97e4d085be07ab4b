"""An engine around a model that is open, as its config says."""

from megatron_ee.config import Config
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.scheduling.strategies.named import planner_for


def make_engine(
    model: OpenedModel,
    config: Config,
    *,
    slots: int,
    capacity: int,
    max_pending: int,
    recorder: Recorder | None = None,
) -> Engine:
    """An engine that holds nothing yet. All processes that hold the model together have to make the same.

    Args:
        slots: most requests inside at a time.
        capacity: longest sequence, prompt and answer, in positions; never more than the model was made for.
        max_pending: the largest that a request may name.
        recorder: notes launches, if the model is a pipeline.
    """
    settings, cache = config.inference, config.inference.kv_cache
    batch = Batch(
        model,
        slots=slots,
        capacity=capacity if model.max_positions is None else min(capacity, model.max_positions),
        max_pending=max_pending,
        prefill_chunk=settings.prefill_chunk,
        blocks=None if cache.positions is None else Blocks(slots, cache.positions, cache.block_size),
        keeps_prefixes=cache.keep_prefixes,
    )
    planner = planner_for(
        settings.scheduling,
        model.launch_costs,
        model.stages,
        model.depths,
        residents=slots,
        prefill_chunk=settings.prefill_chunk,
    )
    return Engine(batch, planner, whole=cache.admission == "answer", recorder=recorder)
