"""The ways of decoding that an evaluation compares, by name: full depth, early exit at some thresholds, and so on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError, did_you_mean

FULL = "full"
NAMES = (FULL, "early_exit", "speculative", "sled", "dola")
DEFAULT = (FULL, "early_exit")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

_FIELDS = {
    "full": (),
    "early_exit": ("measure", "threshold", "thresholds", "exits", "min_exit", "patience", "kv_policy"),
    "speculative": ("draft_exit", "draft_length", "draft_threshold", "exits", "min_exit"),
    "sled": ("sled",),
    "dola": ("dola",),
}


class Mode(NamedTuple):
    """
    Attributes:
        name: in tables and files; of early exit, with its threshold.
    """

    name: str
    exit: ExitParams

    @property
    def asked(self) -> dict[str, Any]:
        """The fields of a request to a server, so that none of its own defaults has a say in it."""
        return self.exit.model_dump(mode="json", include={"mode", *_FIELDS[self.exit.mode]}, exclude_none=True)


def modes_of(names: Sequence[str], thresholds: Sequence[float], base: ExitParams) -> list[Mode]:
    """Full depth first, whatever the order of names, since others are held beside it.

    Args:
        names: of NAMES; `early_exit` stands for a mode at each threshold.
        base: what is the same in all of them: measure, patience, min_exit and so on. Thresholds of single exits make
            way for those that are tried.

    Raises:
        FieldError: there is no such mode, or a threshold is not in [0, 1].
    """
    for name in names:
        if name not in NAMES:
            raise FieldError("--modes", f"{name!r} is none of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise FieldError("--thresholds", f"{threshold:g} is not in 0 to 1")
    modes = []
    for name in (name for name in NAMES if name in names):
        if name == "early_exit":
            modes += [_at(threshold, base) for threshold in sorted(set(thresholds))]
        else:
            modes.append(Mode(name, base.model_copy(update={"mode": name})))
    return modes


def _at(threshold: float, base: ExitParams) -> Mode:
    tried = {"mode": "early_exit", "threshold": threshold, "thresholds": {}}
    return Mode(f"threshold {threshold:g}", base.model_copy(update=tried))
