"""Decodes candidates as they would be deployed, and keeps what they lose and gain. Shapes: J candidates, N prompts."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from calibration_path import Candidate
from calibration_prompts import Asked
from calibration_risks import AGAINST_REFERENCES, difference, disagreement

from megatron_ee.config import ExitParams
from megatron_ee.inference.completion import Completion
from megatron_ee.inference.llm import LLM


@dataclass(frozen=True, eq=False)
class Measured:
    """What a candidate did with all prompts.

    Attributes:
        losses_N: fp64, in [0, 1].
        depths: number of layers run -> tokens that came out there.
        seconds: of the one run.
    """

    candidate: Candidate
    losses_N: np.ndarray
    depths: Mapping[int, int]
    seconds: float

    @property
    def risk(self) -> float:
        return float(self.losses_N.mean())

    @property
    def tokens(self) -> int:
        return sum(self.depths.values())

    @property
    def mean_depth(self) -> float:
        return sum(layer * count for layer, count in self.depths.items()) / self.tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def worst_decile(self) -> float:
        """Mean loss of the tenth of the prompts that lose most."""
        return float(np.sort(self.losses_N)[-max(1, len(self.losses_N) // 10) :].mean())


class Trial:
    """The same prompts for every candidate.

    Args:
        risk: one of `calibration_risks.RISKS`; those against references need them.
    """

    def __init__(self, llm: LLM, asked: Asked, risk: str) -> None:
        self._llm, self._asked, self._risk = llm, asked, risk
        self._of_full: list[Completion] = []

    def measure(self, candidate: Candidate) -> Measured:
        """Full depth has to come first."""
        prompts, params = list(self._asked.prompts), candidate.params
        began = time.perf_counter()
        texts = self._llm.generate(prompts, None, params)
        seconds = time.perf_counter() - began
        if params.mode == "full":
            self._of_full = texts
        depths = Counter(layer for text in texts for layer in text.exit_layers)
        return Measured(candidate, self._losses(texts, params), dict(sorted(depths.items())), seconds)

    def _losses(self, texts: Sequence[Completion], params: ExitParams) -> np.ndarray:
        if loss := AGAINST_REFERENCES.get(self._risk):
            pairs = zip(texts, self._asked.references, strict=True)
            return np.array([loss(text.text, reference) for text, reference in pairs])
        if params.mode == "full":
            return np.zeros(len(texts))
        if self._risk == "difference":
            return np.array([difference(*pair) for pair in zip(texts, self._of_full, strict=True)])
        requests = self._llm.requests(list(self._asked.prompts), None, params)
        return np.array([disagreement(self._llm.model, *pair) for pair in zip(requests, texts, strict=True)])
