"""Self-speculation beside full depth, beside the law of its launches, and beside Hugging Face's.

Full depth begins and ends each round, on the round's own prompts. Hugging Face takes turns with each setting of its
own, in fewer rounds.
"""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from bench_decode_assisted import AssistedDecoding, norms_of
from bench_decode_cycles import CycleTimer
from bench_decode_full import HuggingFaceDecoding, same_tokens
from bench_decode_law import Answers, SpeculationCosts
from bench_decode_setup import Decoding, Prompts, Sizes, context_of, full_depth
from bench_report import Measure, Rounds, all_take_turns, measure_of

from megatron_ee.config import ExitParams

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel
    from megatron_ee.inference.request import Emission

GOAL_OF_LAW = 0.85
GOAL_OVER_HUGGINGFACE = 3.0
GOAL_OVER_FULL = 1.3
"""Where the law allows so much, else what it allows. All three are of one sequence."""


Setting = tuple[int | Literal["auto"], int | Literal["auto"]]
"""The exit that drafts, and the tokens of a draft."""


class Speculating(Decoding):
    """
    Attributes:
        layers: of each round, the exit that drafts in each cycle.
    """

    def __init__(self, model: "OpenedModel", prompts: Prompts, sizes: Sizes, exit_params: ExitParams) -> None:
        super().__init__(model, prompts, sizes, exit_params)
        self._exits, self._launches = model.exits, list[dict[tuple[int, int], int]]()
        self.layers: dict[int, list[int]] = {}

    def __call__(self, number: int) -> float:
        self._launches = []
        seconds = super().__call__(number)
        self.layers[number] = [self._layer(*pair) for pair in zip(self._launches, self._launches[1:-1], strict=False)]
        return seconds

    def _step(self) -> list[tuple[int, "Emission"]]:
        emitted = super()._step()
        self._launches.append(dict(self._batch.walk.work.launches))
        return emitted

    def _layer(self, before: dict[tuple[int, int], int], after: dict[tuple[int, int], int]) -> int:
        """Where verification began; any exit where nothing was drafted."""
        began = [start for (start, stop), count in after.items() if start and count > before.get((start, stop), 0)]
        return began[0] if began else self._exits[0]


@dataclass(frozen=True)
class Cell:
    """What came of one setting. Lists have a value for each round that counts, in the rounds' order."""

    decoding: Speculating
    full: Decoding
    rounds: Rounds
    costs: SpeculationCosts
    sizes: Sizes
    beside: "Beside | None"

    @property
    def speeds(self) -> list[float]:
        """Over full depth."""
        return [1 / ratio for ratio in self.rounds.paired]

    @cached_property
    def answers(self) -> list[Answers]:
        return [Answers.of(self.decoding.said[number]) for number in self._numbers]

    @cached_property
    def seconds(self) -> list[float]:
        """At least, by the law."""
        layers = [self.decoding.layers[number] for number in self._numbers]
        return [self.costs.law(of.cycles(own)) for of, own in zip(self.answers, layers, strict=True)]

    @cached_property
    def laws(self) -> list[float]:
        """Speed-ups over full depth."""
        full = self.costs.full([self.sizes.new_tokens] * self.sizes.sequences)
        return [full / seconds for seconds in self.seconds]

    @property
    def same_tokens(self) -> float:
        """The share of texts that full depth says too, to the last token."""
        pairs = [
            (own, full)
            for number in self._numbers
            for own, full in zip(self.decoding.said[number], self.full.said[number], strict=True)
        ]
        return sum(_tokens(own) == _tokens(full) for own, full in pairs) / len(pairs)

    @property
    def measures(self) -> list[Measure]:
        params, alone = self.decoding.exit, self.sizes.sequences == 1
        setting = f"E{params.draft_exit}_d{params.draft_length}_b{self.sizes.sequences}"
        of_law = [speed / law for speed, law in zip(self.speeds, self.laws, strict=True)]
        aa, context = self.rounds.aa, self.context
        over_full = min(GOAL_OVER_FULL, context["law"]) if alone else None
        measures = [
            measure_of(f"speculation_over_full_{setting}", self.speeds, "higher", aa, context, goal=over_full),
            measure_of(
                f"speculation_of_law_{setting}", of_law, "higher", aa, context, goal=GOAL_OF_LAW if alone else None
            ),
        ]
        if self.beside is not None:
            measures.append(self.beside.measure(setting))
        return measures

    @property
    def context(self) -> dict[str, Any]:
        tokens = self.sizes.new_tokens * self.sizes.sequences
        of_all = Answers.of(text for number in self._numbers for text in self.decoding.said[number])
        return context_of(
            self.sizes,
            acceptance=of_all.acceptance,
            tokens_per_cycle=of_all.tokens_per_cycle,
            drafted_per_cycle=of_all.drafted_per_cycle,
            law=statistics.median(self.laws),
            share_of_launches=statistics.median(
                law / seconds for law, seconds in zip(self.seconds, self.rounds.b, strict=True)
            ),
            same_tokens=self.same_tokens,
            tokens_per_cpu_second=tokens / statistics.median(self.rounds.b),
            full_depth_tokens_per_cpu_second=tokens / statistics.median(self.rounds.a),
        )

    @property
    def _numbers(self) -> list[int]:
        return sorted(self.decoding.said)[1:]


@dataclass(frozen=True)
class Beside:
    """One setting beside Hugging Face's own of it, and beside its plain `generate`. Seconds are of rounds."""

    decoding: Speculating
    assisted: AssistedDecoding
    own: list[float]
    theirs: list[float]
    plain: list[float]
    aa: float

    def measure(self, setting: str) -> Measure:
        """Tokens per second over Hugging Face's."""
        sizes, passes, depth = self.assisted.sizes, self.assisted.passes, len(self.assisted.model.model.layers)
        tokens = sizes.new_tokens
        context = context_of(
            sizes,
            tokens_per_cpu_second=tokens / statistics.median(self.own),
            huggingface_tokens_per_cpu_second=tokens / statistics.median(self.theirs),
            huggingface_over_its_plain=statistics.median(
                plain / theirs for plain, theirs in zip(self.plain, self.theirs, strict=True)
            ),
            huggingface_tokens_per_cycle=self.assisted.tokens_per_cycle,
            huggingface_drafted_per_cycle=passes[self.assisted.layer] / passes[depth],
            same_tokens=same_tokens(self.decoding, self.assisted),
        )
        ratios = [theirs / own for own, theirs in zip(self.own, self.theirs, strict=True)]
        name = f"speculation_over_huggingface_{setting}"
        return measure_of(name, ratios, "higher", self.aa, context, goal=GOAL_OVER_HUGGINGFACE)


def speculation_cells(model: "OpenedModel", huggingface: Any, prompts: Prompts, sizes: Sizes) -> list[Cell]:
    """One for each exit and length; of one sequence beside Hugging Face's, of several the first exit alone."""
    alone = sizes.sequences == 1
    exits = model.exits if alone else model.exits[:1]
    settings = [*_fixed(exits, sizes), *_adapting(exits)] if alone else _fixed(exits, sizes)
    timer = CycleTimer(model, sizes, exits, range(_longest(sizes) + 1))
    full = Decoding(model, prompts, sizes, full_depth())
    decodings = [Speculating(model, prompts, sizes, _params(setting)) for setting in settings]
    *rounds, _ = all_take_turns(sizes.speculation_rounds, full, [*decodings, timer])
    beside = _beside(model, huggingface, prompts, sizes) if alone else {}
    return [
        Cell(decoding, full, of, timer.costs, sizes, beside.get(setting))
        for decoding, of, setting in zip(decodings, rounds, settings, strict=True)
    ]


def speculation_table(cells: list[Cell]) -> Iterator[str]:
    """Lines for people, of the cells of one number of sequences."""
    sizes, context = cells[0].sizes, cells[0].context
    many = "one sequence" if sizes.sequences == 1 else f"{sizes.sequences} sequences"
    yield f"{many}: full depth {context['full_depth_tokens_per_cpu_second']:.0f} tokens/s; self-speculation"
    yield (
        f"{'exit':>5}{'draft':>6}{'accepts':>9}{'a cycle':>9}{'speed':>8}{'p10':>7}{'p90':>7}{'A/A':>7}{'law':>8}"
        f"{'of law':>8}{'launches':>10}{'same':>7}{'Hugging Face':>14}{'its speed':>11}"
    )
    for cell in cells:
        speed, of_law, *beside = cell.measures
        params, context, (low, high) = cell.decoding.exit, cell.context, speed.spread
        theirs = ""
        if beside:
            theirs = f"{beside[0].value:>13.2f}x{beside[0].context['huggingface_over_its_plain']:>10.2f}x"
        yield (
            f"{params.draft_exit:>5}{params.draft_length:>6}{context['acceptance']:>9.1%}"
            f"{context['tokens_per_cycle']:>9.2f}{speed.value:>7.2f}x{low:>7.2f}{high:>7.2f}{speed.aa:>7.3f}"
            f"{context['law']:>7.2f}x{of_law.value:>8.2f}{context['share_of_launches']:>10.2f}"
            f"{context['same_tokens']:>7.0%}{theirs}"
        )


def _beside(model: "OpenedModel", huggingface: Any, prompts: Prompts, sizes: Sizes) -> dict[Setting, Beside]:
    """Every exit and length, each side by side, and the plain `generate`, in the same rounds."""
    few, norms = replace(sizes, new_tokens=sizes.assisted_tokens), norms_of(model)
    settings = _fixed(model.exits, sizes)
    own = [Speculating(model, prompts, few, _params(setting)) for setting in settings]
    assisted = [
        AssistedDecoding(huggingface, prompts, few, norms=norms, layer=layer, length=length)
        for layer, length in settings
        if layer != "auto" and length != "auto"
    ]
    turns = [run for pair in zip(own, assisted, strict=True) for run in pair]
    full = Decoding(model, prompts, few, full_depth())
    *rounds, plain = all_take_turns(
        sizes.assisted_rounds, full, [*turns, HuggingFaceDecoding(huggingface, prompts, few)]
    )
    return {
        setting: Beside(ours, theirs, of_ours.b, of_theirs.b, plain.b, plain.aa)
        for setting, ours, theirs, of_ours, of_theirs in zip(
            settings, own, assisted, rounds[::2], rounds[1::2], strict=True
        )
    }


def _fixed(exits: Iterable[int], sizes: Sizes) -> list[Setting]:
    return [(layer, length) for layer in exits for length in sizes.draft_lengths]


def _adapting(exits: Iterable[int]) -> list[Setting]:
    return [*((layer, "auto") for layer in exits), ("auto", "auto")]


def _longest(sizes: Sizes) -> int:
    """Draft: the first token of an answer and the last one are not drafted."""
    from megatron_ee.inference.speculation.pace import MOST_DRAFTED

    return min(MOST_DRAFTED if sizes.sequences == 1 else max(sizes.draft_lengths), sizes.new_tokens - 2)


def _params(setting: Setting) -> ExitParams:
    layer, length = setting
    return ExitParams(mode="speculative", draft_exit=layer, draft_length=length)


def _tokens(text: list["Emission"]) -> list[int]:
    return [emission.token for emission in text]
