"""When an exit fires, by what one request asks. Plain Python: confidences come as numbers."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from megatron_ee.config import ExitParams, KvPolicy
from megatron_ee.config.checks_exits import unknown_exits
from megatron_ee.errors import FieldError


class ExitRule:
    """What a request's exit settings say of one model. It holds nothing of any token.

    Args:
        exits: the model's, ascending.
        gated: those of them with a gate.

    Attributes:
        thresholds: the confidence that each exit that may fire needs, ascending by layer.
        drafts: the exits that may draft.
        heard: the exits that correct the final logits.
        measure: the name of what that confidence is.
        patience: so many exits in a row, the one that fires last, have to choose its token.

    Raises:
        FieldError: the request names an exit that the model doesn't have, or asks gates that aren't there.
    """

    def __init__(self, params: ExitParams, exits: Sequence[int], gated: Collection[int]) -> None:
        for field, message in unknown_exits(params, exits):
            raise FieldError(field, message)
        self.thresholds: Mapping[int, float] = MappingProxyType(params.may_fire(exits))
        self.drafts, self.heard = params.may_draft(exits), params.heard(exits)
        self.measure, self.patience = params.measure, params.patience
        self.kv_policy: KvPolicy = params.kv_policy
        self.max_pending = params.max_pending
        if self.measure == "gate":
            _check_gates(self.thresholds, gated)

    @property
    def asked(self) -> tuple[int, ...]:
        """Every exit whose head may be asked."""
        return (*self.thresholds, *self.drafts, *self.heard)

    @property
    def needs_choices(self) -> bool:
        """Whether it has to know the likeliest token also at exits that don't fire."""
        return self.patience > 1

    @property
    def compares_states(self) -> bool:
        """Whether an exit's confidence needs the hidden state at the exit before."""
        return self.measure == "cosine"

    def stops_at(self, exits: Sequence[int]) -> tuple[int, ...]:
        """The model's exits at which a token's row is looked at, ascending: those that may fire or are heard, and where
        hidden states are compared, the exit before each of them too."""
        looked_at = {*self.thresholds, *self.heard}
        if self.compares_states:
            looked_at |= {before for before, layer in pairwise(exits) if layer in self.thresholds}
        return tuple(sorted(looked_at))

    def fires(self, layer: int, confidence: float, streak: int = 1) -> bool:
        """Whether a token leaves after `layer`. A threshold of 1 never fires, though a rounded softmax may be 1; a
        confidence of NaN never fires either.

        Args:
            streak: see `Streak`; it matters only where patience is above 1.
        """
        threshold = self.thresholds.get(layer, 1.0)
        return threshold < 1 and confidence >= threshold and streak >= self.patience


class Streak:
    """How many exits in a row have chosen the same token, among those that may fire; for one token of a text."""

    def __init__(self) -> None:
        self._choice: int | None = None
        self._length = 0

    def with_next(self, choice: int) -> int:
        """How many exits in a row, the next one last, choose its likeliest token."""
        return self._length + 1 if choice == self._choice else 1

    def see(self, choice: int) -> int:
        """The next exit's likeliest token. Returns `with_next`."""
        self._choice, self._length = choice, self.with_next(choice)
        return self._length


def _check_gates(asked: Collection[int], gated: Collection[int]) -> None:
    if lacking := sorted(set(asked) - set(gated)):
        which = f"only after {sorted(gated)}" if gated else "none at all"
        raise FieldError(
            "inference.exit.measure", f"gate, but the model has no gate after layers {lacking}, {which} (exits.gate)"
        )
