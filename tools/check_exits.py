"""Hold the last validation loss of every exit against a baseline: check_exits.py RUN --baseline NATS

Prints a line for each exit. Exit status 1: some exit does not beat the baseline, or is worse than a shallower one.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

from metrics_file import ExitLosses, exit_names, read_metrics

from megatron_ee.errors import UserError

TOLERANCE = 0.01  # nats per token


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--baseline", type=float, required=True, metavar="NATS", help="loss to beat, in nats per token")
    parser.add_argument("--baseline-name", default="baseline", metavar="NAME")
    arguments = parser.parse_args()
    try:
        iteration, losses = last_validation(arguments.run)
        names = exit_names(list(losses), arguments.run)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"after {iteration} iterations, in nats per token:")
    print(f"{arguments.baseline_name:<18}{arguments.baseline:7.4f}")
    for layer, loss in losses.items():
        print(f"{names[layer]:<18}{loss:7.4f}  {verdict(loss, arguments.baseline, arguments.baseline_name)}")
    worse = worse_than_shallower(losses)
    for layer in worse:
        print(f"{names[layer]} is worse than the exit before it by more than {TOLERANCE}")
    return 1 if worse or any(not loss < arguments.baseline for loss in losses.values()) else 0


def last_validation(run: Path) -> ExitLosses:
    """
    Raises:
        UserError: the run has no validation record, or no readable record at all.
    """
    validation = read_metrics(run).validation
    if not validation:
        raise UserError(f"{run / 'metrics.jsonl'}: holds no validation record; is training.eval_iters 0?")
    return validation[-1]


def worse_than_shallower(losses: dict[int, float]) -> list[int]:
    """The exits whose loss is above that of the exit before them: depth has to be worth something."""
    return [deep for shallow, deep in pairwise(losses) if not losses[deep] <= losses[shallow] + TOLERANCE]


def verdict(loss: float, baseline: float, name: str) -> str:
    """How a loss compares with the baseline, in words; a loss that is not a number beats nothing."""
    return f"beats the {name} by {baseline - loss:.4f}" if loss < baseline else f"does NOT beat the {name}"


if __name__ == "__main__":
    sys.exit(main())
