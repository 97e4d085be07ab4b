"""Decoding from Python: `LLM(path).generate(prompts, SamplingParams(...), ExitParams(...))`.

Opening a model chooses this process's device, so nothing here imports megatron-core before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.config import Config, ExitParams, SamplingParams
from megatron_ee.errors import FieldError, StageLostError, UserError
from megatron_ee.inference.asking import Asking, Prompt
from megatron_ee.inference.completion import Completion, Piece, completions
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.growing_text import GrowingText
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.request import Emission, Failure, Logprobs, Request, Scores
from megatron_ee.inference.work import Work
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:
    from megatron_ee.inference.engine import Engine
    from megatron_ee.inference.opened import OpenedModel

Prompts = Prompt | Sequence[Prompt]
Sampling = SamplingParams | Sequence[SamplingParams] | None
Exits = ExitParams | Sequence[ExitParams] | None
Result = TypeVar("Result")


class LLM:
    """A model that is open for decoding. It may be open as often as memory allows, and serves one call after another.

    Args:
        path: a run folder (its newest checkpoint), a step folder or a Hugging Face folder.
        config: the path of a config, instead of the one that a run has and of the defaults that another folder gets.
        overrides: of the config, as on a command line: ["inference.exit.threshold=0.8"].
        device: `auto`, `cpu` or `cuda`, instead of the config's.
        recorder: notes launches, if the model is a pipeline.

    Attributes:
        config: its `inference` section holds where a call says nothing.
        model: what is open.

    Raises:
        UserError: the folder cannot be opened, or does not fit the config; the message says why.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: str | Path | None = None,
        overrides: Sequence[str] = (),
        device: Literal["auto", "cpu", "cuda"] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        quiet_dependencies()
        folder = find_model(Path(path))
        overrides = [*overrides, *([f"device={device}"] if device else [])]
        with open_decoding_config(folder, overrides, config_file=Path(config) if config else None) as opened:
            self._take(open_model(folder, opened), opened, recorder)

    @classmethod
    def of(cls, model: "OpenedModel", config: Config, *, recorder: Recorder | None = None) -> Self:
        """Around a model that is open already."""
        llm = cls.__new__(cls)
        llm._take(model, config, recorder)
        return llm

    def generate(self, prompts: Prompts, sampling: Sampling = None, exit: Exits = None) -> list[Completion]:
        """Continue prompts, `inference.max_batch_size` of them at a time.

        No prompt's tokens depend on the others.

        Args:
            prompts: one, or a list: texts, or lists of token ids. Tokens are taken as they are; before a text comes
                what the tokenizer of a Hugging Face folder writes there (<|begin_of_text|>).
            sampling: for all prompts, or a list with one for each; None: the config's.
            exit: likewise.

        Returns:
            A completion for each prompt, in their order.

        Raises:
            UserError: a prompt or its settings don't fit the model: the message names it, as prompts.3, and nothing has
                been decoded. Or a prompt's logits are no numbers.
            StageLostError: the process of another stage is gone.
        """
        requests, pieces = self._begin(prompts, sampling, exit)
        whole = dict(completions(requests, pieces))
        return [whole[index] for index in range(len(requests))]

    def stream(self, prompts: Prompts, sampling: Sampling = None, exit: Exits = None) -> Iterator[Piece]:
        """`generate`, token by token as they come; those of several prompts in turns. Errors are raised at once."""
        _, pieces = self._begin(prompts, sampling, exit)
        return pieces

    def score(self, prompts: Prompts, *, top: int = 0) -> list[tuple[Logprobs, ...]]:
        """How likely prompts are at full depth: natural log-probabilities of their tokens, each given all before it.

        Args:
            prompts: see `generate`; what comes before a text is a part of it.
            top: how many of the likeliest tokens are given with each, descending.

        Returns:
            Of each prompt, one for each of its tokens but the first one, in order.

        Raises:
            UserError, StageLostError: as `generate`.
        """
        if top < 0:
            raise FieldError("top", f"{top} is below 0")
        requests = self.requests(prompts, SamplingParams(max_new_tokens=1), ExitParams(mode="full"))
        if not requests:
            return []
        engine = self._engine_with([replace(request, prompt_logprobs=top) for request in requests])
        scores: dict[int, tuple[Logprobs, ...]] = {}
        with self._closing(engine):
            while not engine.is_idle:
                for index, said in _said_by(engine):
                    if isinstance(said, Scores):
                        scores[index] = said.logprobs
        return [scores[index] for index in range(len(requests))]

    def requests(self, prompts: Prompts, sampling: Sampling = None, exit: Exits = None) -> list[Request]:
        """What `generate` makes of its arguments."""
        return self._asking.requests(prompts, sampling, exit)

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the processes that hold the model together; alone it is."""
        return self.model.mesh is None or self.model.mesh.is_main

    def from_first(self, work: Callable[[], Result]) -> Result:
        """What a function returns on the first of them, which alone calls it; on all of them.

        Raises:
            UserError: the function raised it there.
        """
        return work() if self.model.mesh is None else self.model.mesh.from_main(work)

    @property
    def work(self) -> Work:
        """What has been run so far, by calls whose texts have ended."""
        return self._work + self.model.runner.work

    def _take(self, model: "OpenedModel", config: Config, recorder: Recorder | None) -> None:
        self.model, self.config, self._work, self._recorder = model, config, Work(), recorder
        self._asking = Asking(config, model.tokenizer, model.begin, model.stop_token_ids)

    def _begin(self, prompts: Prompts, sampling: Sampling, exit: Exits) -> tuple[list[Request], Iterator[Piece]]:
        requests = self.requests(prompts, sampling, exit)
        return requests, self._run(self._engine_with(requests), requests) if requests else iter(())

    def _engine_with(self, requests: Sequence[Request]) -> "Engine":
        """One that has all of them, by their indices."""
        from megatron_ee.inference.engines import make_engine

        engine = make_engine(
            self.model,
            self.config,
            slots=min(len(requests), self.config.inference.max_batch_size),
            capacity=max(len(request.prompt) + request.sampling.max_new_tokens for request in requests),
            max_pending=max(request.exit.max_pending for request in requests),
            recorder=self._recorder,
        )
        for index, request in enumerate(requests):
            _add(engine, index, request)
        return engine

    def _run(self, engine: "Engine", requests: Sequence[Request]) -> Iterator[Piece]:
        texts = {index: GrowingText(index, request, self.model.tokenizer) for index, request in enumerate(requests)}
        with self._closing(engine):
            while texts:
                for index, emission in _said_by(engine):
                    if index not in texts or not isinstance(emission, Emission):
                        continue  # of several tokens an earlier one has ended the text, by a stop string
                    piece = texts[index].take(emission)
                    if piece.finish_reason is not None:
                        engine.abort(index)
                        del texts[index]
                    yield piece

    @contextmanager
    def _closing(self, engine: "Engine") -> Iterator[None]:
        try:
            yield
        except (GeneratorExit, UserError):  # of these all processes know, and not of an interrupt
            engine.close()
            raise
        else:
            engine.close()
        finally:
            self._work += engine.batch.walk.work


def open_model(folder: Path, config: Config) -> "OpenedModel":
    """Choose this process's device, and open the folder there."""
    from megatron_ee.device import choose_device

    device = choose_device(config.device)
    from megatron_ee.inference.loading import load_model  # imports megatron-core, which needs a chosen device

    return load_model(folder, config, device)


def _said_by(engine: "Engine") -> Iterator[tuple[int, Emission | Scores]]:
    """With its next step."""
    for index, said in engine.step():
        if isinstance(said, Failure):
            kind = StageLostError if engine.is_lost else UserError
            raise kind(f"prompts.{index}: {said.reason}")
        yield index, said


def _add(engine: "Engine", index: int, request: Request) -> None:
    """All before anything is decoded, so that one wrong prompt takes no time of the others."""
    try:
        engine.add(request)
    except FieldError as error:
        if error.field == "prompt":
            raise FieldError(f"prompts.{index}", error.message) from error
        raise FieldError(error.field, f"{error.message} (prompts.{index})") from error
