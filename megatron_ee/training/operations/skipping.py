"""Steps that update nothing, because their gradients are no numbers.

In fp16 that is how the loss scale is found. In other precisions, or at the lowest scale, it is a bad batch, a bad
machine, or a run that diverges: one such step is left out, several in a row end the run.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.data.batch import Batch
from megatron_ee.errors import UserError
from megatron_ee.parallel.mesh import Mesh

RECORD = "nonfinite.jsonl"


class DivergedError(UserError):
    """The loss or its gradient is no number, again and again. All ranks see it in the same step."""


@dataclass
class SkippedSteps:
    """Counts them, and says which batches they were of.

    Attributes:
        most_in_a_row: how many end the run.
        since_record: all of them since figures were last logged.
        in_a_row: those for want of numbers, up to now.
    """

    mesh: Mesh
    most_in_a_row: int
    since_record: int = 0
    in_a_row: int = 0
    _log: logging.Logger = field(default_factory=lambda: logging.getLogger("megatron_ee"))

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"since_record": self.since_record, "in_a_row": self.in_a_row}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from what `state` gave."""
        self.since_record, self.in_a_row = state["since_record"], state["in_a_row"]

    def count_overflow(self) -> None:
        """A step was skipped whose gradients were too large for its loss scale."""
        self.since_record += 1

    def count_nonfinite(
        self, iteration: int, batch: Batch, *, first_sample: int, losses: Mapping[int, float], folder: Path | None
    ) -> None:
        """A step was skipped for want of numbers. Collective.

        Args:
            iteration: counted from 1.
            first_sample: the number in the training data of the first of the batch's samples.
            losses: of each exit, over all ranks.
            folder: where the main rank leaves which batch it was; None: nowhere.

        Raises:
            DivergedError: these were too many in a row.
        """
        self.since_record += 1
        self.in_a_row += 1
        identity = self._identify(iteration, batch, first_sample, losses)
        last = identity["samples"][1] - 1
        said = f"iteration {iteration}: the gradients are no numbers (samples {first_sample} to {last}, {_say(losses)})"
        if self.mesh.is_main:
            self._log.warning("%s; the step is skipped, %d in a row", said, self.in_a_row)
            if folder is not None:
                self._leave(folder / RECORD, identity)
        if self.in_a_row >= self.most_in_a_row:
            raise DivergedError(
                f"{said}, as in {self.in_a_row} steps in a row (faults.max_nonfinite); training stops here, and "
                f"nothing of them is saved. Resume from an earlier checkpoint, with a lower optimizer.lr say"
            )

    def _identify(self, iteration: int, batch: Batch, first_sample: int, losses: Mapping[int, float]) -> dict[str, Any]:
        """What it takes to find the batch again."""
        tokens = batch.tokens_MBS
        shares = self.mesh.gather(hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest())
        ranks_per_stage = self.mesh.data_size * self.mesh.tensor_size
        num_samples = tokens.shape[0] * tokens.shape[1] * self.mesh.data_size
        return {
            "iteration": iteration,
            "samples": [first_sample, first_sample + num_samples],
            "sha256_of_data_ranks_tokens": shares[: ranks_per_stage : self.mesh.tensor_size],
            "losses": {str(layer): loss if math.isfinite(loss) else str(loss) for layer, loss in losses.items()},
        }

    def _leave(self, path: Path, identity: dict[str, Any]) -> None:
        try:
            with path.open("a") as file:
                file.write(json.dumps(identity) + "\n")
        except OSError as error:
            self._log.error("which batch it was cannot be written down: %s", error)


def _say(losses: Mapping[int, float]) -> str:
    return ", ".join(f"loss of exit {layer}: {loss:.4g}" for layer, loss in losses.items())
