"""Which of several candidates may be deployed, by their losses on the same inputs.

Candidates are given in an order that was fixed before: the most careful one first. Shapes: J candidates, N inputs.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from megatron_ee.inference.calibration.p_values import Losses, betting, hoeffding_bentkus

Method = Literal["hoeffding_bentkus", "betting", "conformal"]

P_VALUES: dict[str, Callable[[Losses, float], float]] = {"hoeffding_bentkus": hoeffding_bentkus, "betting": betting}


def learn_then_test(
    losses_JN: Losses, target: float, delta: float, *, p_value: Callable[[Losses, float], float] = hoeffding_bentkus
) -> int | None:
    """The last candidate, in their order, up to which each one's risk is shown to be at most the target; None: not even
    the first one's (Learn then Test, arXiv 2110.01052, with fixed-sequence testing).

    With a probability of at least 1 - delta over the inputs, the risk of what is returned is at most the target. Since
    the first candidate that cannot be shown ends it, all are tested at the whole delta, and what comes after it cannot
    be returned, however small its losses are.

    Args:
        target: above 0 and below 1.
    """
    shown = None
    for number, losses_N in enumerate(losses_JN):
        if p_value(losses_N, target) > delta:
            break
        shown = number
    return shown


def conformal_risk_control(losses_JN: Losses, target: float) -> int | None:
    """The last candidate whose losses, with one loss of 1 added, are at most the target on average; None: there is none
    (conformal risk control, arXiv 2208.02814).

    The risk of what is returned is at most the target on average over inputs and the next one: with some inputs it is
    above it. A candidate has, for each input, the largest loss of those before it too: then losses never fall from one
    to the next, which the method needs, and they are no smaller than they were.

    Args:
        target: above 0 and below 1.
    """
    assert 0 < target < 1, target
    if not len(losses_JN):
        return None
    rising_JN = np.maximum.accumulate(losses_JN, axis=0)
    inputs = losses_JN.shape[1]
    held = np.flatnonzero(rising_JN.sum(1) + 1 <= target * (inputs + 1))
    return int(held[-1]) if len(held) else None


def choose_candidate(losses_JN: Losses, target: float, delta: float, method: Method) -> int | None:
    """By one of the methods; see `learn_then_test` and `conformal_risk_control`, which takes no delta."""
    if method == "conformal":
        return conformal_risk_control(losses_JN, target)
    return learn_then_test(losses_JN, target, delta, p_value=P_VALUES[method])
