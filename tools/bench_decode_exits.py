"""Early exits beside full depth, and beside the least time that their own depths need.

For every threshold and every policy for missing keys and values, on other prompts in every round. Full depth begins
and ends each round, which gives a ratio and an A/A pair of the same prompts.
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from bench_decode_costs import measured_costs
from bench_decode_ideal import KvPolicy, LaunchCosts, Need, full_need, need
from bench_decode_setup import Decoding, Prompts, Sizes, context_of, full_depth
from bench_report import Measure, Rounds, all_take_turns, measure_of
from torch.nn.functional import cross_entropy

from megatron_ee.config import ExitParams

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel

MEASURE = "max_probability"
GOAL = 0.9
"""Of one sequence: the measured speed-up over the ideal one."""


@dataclass(frozen=True)
class Cell:
    """What came of one setting. Lists have a value for each round that counts, in the rounds' order."""

    decoding: Decoding
    rounds: Rounds
    costs: LaunchCosts
    sizes: Sizes
    judged: "Judged"

    @property
    def speeds(self) -> list[float]:
        """Over full depth."""
        return [1 / ratio for ratio in self.rounds.paired]

    @cached_property
    def needs(self) -> list[Need]:
        prompts = [self.sizes.prompt_length] * self.sizes.sequences
        return [need(depths, prompts, self.costs, self.decoding.exit.kv_policy) for depths in self.depths]

    @cached_property
    def ideals(self) -> list[float]:
        """Speed-ups over full depth."""
        prompts, counts = ([size] * self.sizes.sequences for size in (self.sizes.prompt_length, self.sizes.new_tokens))
        full = full_need(counts, prompts, self.costs).total
        return [full / each.total for each in self.needs]

    @property
    def depths(self) -> list[list[list[int]]]:
        """Of each round and sequence."""
        said = self.decoding.said
        return [[[emission.exit_layer for emission in text] for text in said[number]] for number in sorted(said)[1:]]

    @property
    def by_exit(self) -> dict[int, int]:
        """Exit layer -> tokens."""
        return dict(sorted(Counter(depth for of in self.depths for text in of for depth in text).items()))

    @property
    def mean_depth(self) -> float:
        return sum(layer * count for layer, count in self.by_exit.items()) / sum(self.by_exit.values())

    @property
    def label(self) -> str:
        params = self.decoding.exit
        return params.kv_policy if params.measure == MEASURE else f"{params.kv_policy} {params.measure}"

    @property
    def verdict(self) -> str:
        """Whether exits pay: in nine rounds of ten, in one of ten, or neither."""
        low, *_, high = statistics.quantiles(self.speeds, n=10, method="inclusive")
        return "pays" if low > 1 else "does not pay" if high < 1 else "even"

    @property
    def measures(self) -> list[Measure]:
        params, count = self.decoding.exit, self.sizes.sequences
        setting = f"{self.label.replace(' ', '_')}_{params.threshold:g}_b{count}"
        over_ideal = [speed / ideal for speed, ideal in zip(self.speeds, self.ideals, strict=True)]
        goal = GOAL if count == 1 else None
        return [
            measure_of(f"exits_over_full_{setting}", self.speeds, "higher", self.rounds.aa, self.context),
            measure_of(f"exits_over_ideal_{setting}", over_ideal, "higher", self.rounds.aa, self.context, goal=goal),
        ]

    @property
    def context(self) -> dict[str, Any]:
        """Costs are in layers of one row, for each token, or each exit that was asked."""
        tokens, layer = self.sizes.new_tokens * self.sizes.sequences, self.costs.layer
        return context_of(
            self.sizes,
            mean_depth=self.mean_depth,
            tokens_by_exit=self.by_exit,
            agreement=self.judged.agreement,
            loss_under_full_depth=self.judged.loss,
            ideal=statistics.median(self.ideals),
            verdict=self.verdict,
            eta=self.costs.eta,
            phi=statistics.median(each.missing_kv for each in self.needs) / tokens / layer,
            tokens_per_cpu_second=tokens / statistics.median(self.rounds.b),
        )


def exit_cells(model: "OpenedModel", prompts: Prompts, sizes: Sizes) -> list[Cell]:
    """One for each policy and threshold, and one for each other measure that the model has."""
    settings = [
        ExitParams(threshold=threshold, kv_policy=policy)
        for policy in get_args(KvPolicy)
        for threshold in sizes.thresholds
    ]
    for measure, threshold in sizes.measures:
        if measure != "gate" or model.gated:
            settings.append(ExitParams(measure=measure, threshold=threshold))
    costs = {measure: measured_costs(model, sizes, measure) for measure in dict.fromkeys(of.measure for of in settings)}
    decodings = [Decoding(model, prompts, sizes, setting) for setting in settings]
    rounds = all_take_turns(sizes.exit_rounds, Decoding(model, prompts, sizes, full_depth()), [*decodings])
    judge = Judge(model, prompts)
    return [
        Cell(decoding, of, costs[decoding.exit.measure], sizes, judge.of(decoding))
        for decoding, of in zip(decodings, rounds, strict=True)
    ]


class Judged(NamedTuple):
    """Of tokens, by the full model, given the same text before them: the share that it would have chosen, and the loss
    that they have there, in nats per token."""

    agreement: float
    loss: float


class Judge:
    """Reads all texts again, at full depth; each once, as exact policies say the same."""

    def __init__(self, model: "OpenedModel", prompts: Prompts) -> None:
        self._model, self._prompts = model, prompts
        self._heard: dict[tuple[int, ...], tuple[int, float]] = {}

    def of(self, decoding: Decoding) -> Judged:
        """Over all rounds."""
        agreed, loss, total = 0, 0.0, 0
        for number, said in decoding.said.items():
            for prompt, text in zip(self._prompts.of_round(number, len(said)), said, strict=True):
                tokens = [emission.token for emission in text]
                of_text = self._hear(prompt, tokens)
                agreed, loss, total = agreed + of_text[0], loss + of_text[1], total + len(tokens)
        return Judged(agreed / total, loss / total)

    @torch.inference_mode()
    def _hear(self, prompt: tuple[int, ...], tokens: list[int]) -> tuple[int, float]:
        """Tokens that the full model would have chosen, and the sum of all their losses."""
        whole = (*prompt, *tokens)
        if whole not in self._heard:
            logits_TV = self._model.full_depth_logits(whole)[len(prompt) - 1 : -1].float()
            said_T = torch.tensor(tokens, device=logits_TV.device)
            agreed = int((logits_TV.argmax(-1) == said_T).sum())
            self._heard[whole] = agreed, float(cross_entropy(logits_TV, said_T, reduction="sum"))
        return self._heard[whole]


def exit_table(cells: list[Cell]) -> Iterator[str]:
    """Lines for people, of the cells of one number of sequences."""
    sizes, costs = cells[0].sizes, cells[0].costs
    full = sizes.sequences * sizes.new_tokens / statistics.median(cells[0].rounds.a)
    many = "one sequence" if sizes.sequences == 1 else f"{sizes.sequences} sequences"
    yield f"{many}: full depth {full:.0f} tokens/s; to ask an exit costs {costs.eta:.2f} layers"
    yield (
        f"{'missing KV, measure':<20}{'threshold':>9}{'depth':>7}{'agrees':>8}{'loss':>7}{'speed':>8}{'p10':>7}"
        f"{'p90':>7}{'A/A':>7}{'ideal':>8}{'of ideal':>9}  {'verdict':<14}tokens by exit"
    )
    for cell in cells:
        speed, over_ideal = cell.measures
        low, high = speed.spread
        total = sum(cell.by_exit.values())
        used = "  ".join(f"{layer}: {count / total:.0%}" for layer, count in cell.by_exit.items())
        yield (
            f"{cell.label:<20}{cell.decoding.exit.threshold:>9g}{cell.mean_depth:>7.2f}"
            f"{cell.judged.agreement:>8.1%}{cell.judged.loss:>7.3f}"
            f"{speed.value:>7.2f}x{low:>7.2f}{high:>7.2f}{speed.aa:>7.3f}"
            f"{speed.context['ideal']:>7.2f}x{over_ideal.value:>9.2f}  {cell.verdict:<14}{used}"
        )
