"""A launch that is under way."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_ee.inference.answers import Answers
from megatron_ee.inference.arrivals import Arrival, Leg
from megatron_ee.inference.scheduling.fronts import LaunchPlan
from megatron_ee.inference.sequences import DecodingSequence


@dataclass(slots=True)
class Flight:
    """
    Attributes:
        sequences: by slot, of all its rows.
        joined: by slot, when they joined: when it ends others may have their slots, or they themselves anew.
        asks: somebody is asked where it ends.
        tells: there may be something to tell of it that is not known beforehand.
        arrival, answers: where its layers are.
    """

    plan: LaunchPlan
    leg: Leg
    sequences: Mapping[int, DecodingSequence]
    joined: Mapping[int, int]
    asks: bool
    tells: bool
    arrival: Arrival | None = None
    answers: Answers = field(default_factory=dict)

    @property
    def entering(self) -> Mapping[int, DecodingSequence]:
        """Those whose tokens are on their way."""
        return {slot: self.sequences[slot] for slot in self.plan.counts}
