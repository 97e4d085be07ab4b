"""The law of self-speculation, in measured launch costs; imports no torch.

A cycle drafts d tokens with layers 1 to E and the exit there, takes the last of them through layers 1 to E, and
verifies d + 1 rows with the other layers and the final head:

    d (c_1..E(1) + h(1)) + c_1..E(1) + c_E+1..L(d + 1) + h(d + 1)

with c and h what layers and heads cost by their number of rows. In a batch, rows of all sequences run together. It
counts layers and heads alone, and no bookkeeping.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from megatron_ee.inference.scheduling.costs import Curve, cost_of

if TYPE_CHECKING:
    from megatron_ee.inference.request import Emission


@dataclass(frozen=True, slots=True)
class CycleCosts:
    """What has been measured in cycles of one exit and one length.

    Attributes:
        shallow: layers 1 to E.
        head: the exit, and the token that it proposes.
        deep: layers E + 1 to L.
        final: the final head, and the tokens that it says.
    """

    shallow: Curve
    head: Curve
    deep: Curve
    final: Curve

    def cycle(self, drafted: Sequence[int]) -> float:
        """Seconds at least, of sequences that draft so many tokens each; one that drafts none is at full depth."""
        drafting = [sum(length > place for length in drafted) for place in range(max(drafted))]
        verified = sum(length + 1 for length in drafted)
        return (
            sum(cost_of(self.shallow, rows) + cost_of(self.head, rows) for rows in drafting)
            + cost_of(self.shallow, len(drafted))
            + cost_of(self.deep, verified)
            + cost_of(self.final, verified)
        )


@dataclass(frozen=True, slots=True)
class SpeculationCosts:
    """
    Attributes:
        prompts: seconds that prompts take, and the first token of each.
        cycles: exit -> tokens that the longest draft of a cycle has -> what its launches cost.
    """

    prompts: float
    cycles: Mapping[int, Mapping[int, CycleCosts]]

    def full(self, counts: Sequence[int]) -> float:
        """Seconds at least at full depth.

        Args:
            counts: of each sequence's new tokens.
        """
        plain = next(iter(self.cycles.values()))[0]
        together = [sum(count > number for count in counts) for number in range(1, max(counts))]
        return self.prompts + sum(plain.cycle([0] * count) for count in together)

    def law(self, steps: Iterable["Cycle"]) -> float:
        """Seconds at least, of cycles one after the other."""
        return self.prompts + sum(self.cycles[of.layer][max(of.drafted)].cycle(of.drafted) for of in steps)


class Cycle(NamedTuple):
    """One of a batch: the exit that drafts, and how many tokens it drafts in each of the sequences that go on."""

    layer: int
    drafted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """Of sequences that began together.

    Attributes:
        drafted: of each sequence and each of its cycles, in order.
        accepted: drafted tokens that full depth took.
        refused: cycles in which it did not take all of them.
    """

    drafted: tuple[tuple[int, ...], ...]
    accepted: int
    refused: int

    @classmethod
    def of(cls, texts: Iterable[Sequence["Emission"]]) -> "Answers":
        """The first token of each is the prompt's, and full depth says the last one."""
        drafted, accepted, refused = [], 0, 0
        for text in texts:
            own, run = [], 0
            for emission in text[1:]:
                if emission.drafted:
                    run += 1
                    continue
                own.append(run + emission.discarded)
                accepted += run
                refused += emission.discarded > 0
                run = 0
            assert run == 0, "a draft without full depth's word"
            drafted.append(tuple(own))
        return cls(tuple(drafted), accepted, refused)

    @property
    def acceptance(self) -> float:
        """How often a drafted token is accepted where those before it are; 0 where nothing was drafted."""
        return self.accepted / max(1, self.accepted + self.refused)

    @property
    def tokens_per_cycle(self) -> float:
        """Of each sequence: those accepted, and full depth's own."""
        return 1 + self.accepted / self._num_cycles

    @property
    def drafted_per_cycle(self) -> float:
        return sum(map(sum, self.drafted)) / self._num_cycles

    def cycles(self, layers: Sequence[int]) -> list[Cycle]:
        """Of the whole batch.

        Args:
            layers: the exit that drafts in each.
        """
        together = zip_longest(*self.drafted)
        return [
            Cycle(layer, tuple(length for length in lengths if length is not None))
            for layer, lengths in zip(layers, together, strict=True)
        ]

    @property
    def _num_cycles(self) -> int:
        return sum(map(len, self.drafted))
