"""What self-speculation gains, from acceptance and costs. Plain Python.

A cycle drafts d tokens with layers 1 to E and the head there, takes the last of them through layers 1 to E without a
head, and verifies d + 1 rows with the other layers and the final head.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """Of drafting at one exit, in any unit of time.

    Attributes:
        shallow: one row through the layers up to the exit.
        head: the exit's head at one row.
        deep: one row through the other layers, and the final head.
        row: what each more row adds to `deep`.
        several: what the first of these adds besides: products of several rows are other ones.
    """

    shallow: float
    head: float
    deep: float
    row: float = 0.0
    several: float = 0.0

    @property
    def full(self) -> float:
        """A token at full depth."""
        return self.shallow + self.deep

    @property
    def share_left_out(self) -> float:
        """What the exit does not run of a token at full depth."""
        return self.deep / self.full

    def cycle(self, length: int) -> float:
        """A cycle that drafts so many tokens; of 0, a token at full depth."""
        return self.full + length * (self.shallow + self.head + self.row) + (self.several if length else 0.0)


def tokens_per_cycle(acceptance: float, length: int) -> float:
    """(1 - a^(d + 1)) / (1 - a): the accepted ones, and the one that full depth adds.

    Args:
        acceptance: a, the probability that a drafted token is accepted if those before it are.
    """
    return sum(acceptance**number for number in range(length + 1))


def gain(acceptance: float, length: int, costs: DraftCosts) -> float:
    """How many times as fast as full depth."""
    return tokens_per_cycle(acceptance, length) * costs.full / costs.cycle(length)


def best_length(acceptance: float, costs: DraftCosts, most: int) -> tuple[float, int]:
    """The largest gain of drafts of up to `most` tokens, and the shortest draft that has it; (1, 0) if none gains.

    Beyond the first one, each further token brings less than the one before and costs the same, so that the first
    length that gains less than the one before ends the search.
    """
    best, before, tokens, full = (1.0, 0), 0.0, 1.0, costs.full
    for length in range(1, most + 1):
        tokens += acceptance**length
        gained = tokens * full / costs.cycle(length)
        if gained < before:
            break
        if gained > best[0]:
            best = gained, length
        before = gained
    return best
