"""A model that answers what tasks ask: how likely texts are after others, and how texts go on. It knows nothing of who
asks, and tokens come in and go out.

What lm-evaluation-harness's own model of Hugging Face's does with a text that is too long is done here too: it loses
its beginning.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evaluate_exits import TeacherForced, in_batches
from evaluate_modes import Mode
from sweep_timing import progress

from megatron_ee.config import SamplingParams
from megatron_ee.errors import UserError
from megatron_ee.inference.llm import LLM

DEFAULT_LENGTH = 2048
"""Positions of a model that doesn't say how many it has; the harness takes as many."""


class Scored(NamedTuple):
    """A natural log-probability, summed over tokens, and whether each of them is the likeliest one."""

    log_probability: float
    is_greedy: bool


class TaskModel:
    """
    Args:
        mode: how scores and texts come about.

    Attributes:
        depths: number of layers run -> tokens that were scored or decoded.
        max_length: positions of a text.
    """

    def __init__(self, llm: LLM, mode: Mode) -> None:
        self._llm, self._mode = llm, mode
        self._forced: TeacherForced | None = None
        self.depths = Counter[int]()
        self.max_length = llm.model.max_positions or DEFAULT_LENGTH

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """How likely each continuation is after its context.

        Raises:
            FieldError: see `TeacherForced`.
            UserError: a context or a continuation has no token, or a continuation has more than there are positions.
        """
        self._forced = self._forced or TeacherForced(self._llm.model, [self._mode])
        texts = [self._fitting(context, continuation) for context, continuation in pairs]
        counts = [len(continuation) for _, continuation in pairs]
        scores: dict[int, Scored] = {}
        with progress(len(pairs), f"{self._mode.name} (scores)") as done:
            for batch in in_batches(list(map(len, texts)), self._llm.config.inference.max_batch_size):
                scores |= self._score([texts[index] for index in batch], [counts[index] for index in batch], batch)
                done(len(batch))
        return [scores[index] for index in range(len(pairs))]

    def generate(self, contexts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams]) -> list[str]:
        """How each goes on, without what ends it.

        Raises:
            UserError: a text leaves no room for its context.
        """
        prompts = []
        for context, sampling in zip(contexts, samplings, strict=True):
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"the task asks for {sampling.max_new_tokens} tokens, and the model has {self.max_length} positions"
                )
            prompts.append(list(context)[-room:])
        whole: list[str] = ["" for _ in prompts]
        with progress(len(prompts), f"{self._mode.name} (texts)") as done:
            for piece in self._llm.stream(prompts, list(samplings), self._mode.exit):
                whole[piece.index] += piece.text
                self.depths[piece.emission.exit_layer] += 1
                done(piece.finish_reason is not None)
        return whole

    def _score(
        self, texts: Sequence[Sequence[int]], counts: Sequence[int], indices: Sequence[int]
    ) -> dict[int, Scored]:
        assert self._forced is not None
        said = self._forced.said(texts, counts)
        outcome = self._forced.outcome(self._mode, said)
        self.depths.update(outcome.depths_N.tolist())
        right_N = outcome.answers.choices_N == said.labels_N
        scores, start = {}, 0
        for index, count in zip(indices, counts, strict=True):
            own = slice(start, start + count)
            scores[index] = Scored(-float(outcome.answers.nats_N[own].sum()), bool(right_N[own].all()))
            start += count
        return scores

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """Nothing runs after the last token, so that one more than there are positions fits."""
        if not context or not continuation:
            raise UserError("the task has a question without a token before its answer, or an answer without one")
        if len(continuation) > self.max_length:
            raise UserError(
                f"an answer of the task has {len(continuation)} tokens, the model {self.max_length} positions"
            )
        return [*context, *continuation][-(self.max_length + 1) :]


def sampling_of(settings: Mapping[str, Any]) -> SamplingParams:
    """What a task's `generation_kwargs` ask for, as the harness normalizes them: with until, max_gen_toks, do_sample.

    Raises:
        UserError: there is no such setting here.
    """
    given = dict(settings)
    stops = tuple(stop for stop in given.pop("until") if stop)
    if not given.pop("do_sample"):
        given["temperature"] = 0.0
    fields = {"max_new_tokens": given.pop("max_gen_toks"), "stop": stops, **given}
    if unknown := sorted(set(fields) - set(SamplingParams.model_fields)):
        raise UserError(f"generation_kwargs: {unknown[0]} is no setting of inference.sampling")
    try:
        return SamplingParams.model_validate(fields)
    except ValueError as error:
        raise UserError(f"generation_kwargs: {' '.join(str(error).split())}") from error
