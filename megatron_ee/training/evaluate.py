"""Validation: every exit's loss on held-out text, through the same pipeline."""

from collections.abc import Mapping, Sequence

from megatron_ee.config import ExitsConfig
from megatron_ee.data.loader import BatchLoader
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.runtime import ActionWatch, Runtime
from megatron_ee.training.losses import count_tokens
from megatron_ee.training.observation.metrics import ExitMeter
from megatron_ee.training.stage_step import StageStep


class Evaluator:
    """Measures the same `num_batches` global batches each time.

    Args:
        plan: a forward-only plan with as many micro-batches as the loader's batches have.
    """

    def __init__(
        self,
        stage: Stage,
        loader: BatchLoader,
        runtime: Runtime,
        plan: Plan,
        meter: ExitMeter,
        mesh: Mesh,
        *,
        num_batches: int,
        global_batch_size: int,
        exits: ExitsConfig,
    ) -> None:
        self._stage, self._loader, self._runtime, self._plan = stage, loader, runtime, plan
        self._meter, self._mesh = meter, mesh
        self._num_batches, self._global_batch_size = num_batches, global_batch_size
        self._exits = exits

    def evaluate(self, weights: Mapping[int, float], *, watches: Sequence[ActionWatch] = ()) -> dict[str, float]:
        """Loss, perplexity and accuracy of every exit. Collective."""
        self._stage.eval()
        for number in range(self._num_batches):
            batch = self._loader.batch(number * self._global_batch_size)
            tokens = count_tokens(batch, self._plan, self._mesh)
            step = StageStep(self._stage, batch, self._plan, tokens, None, exits=self._exits)
            self._runtime.run(self._plan, step, watches=watches)
            self._meter.add(step.losses, tokens.regular)
        self._stage.train()
        return self._meter.read("val", weights)
