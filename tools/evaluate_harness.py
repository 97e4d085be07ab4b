"""Tasks of lm-evaluation-harness: the one file that imports it.

A model of ours is one of the harness's models here, which makes tokens of questions and cuts long ones as the harness's
own model of Hugging Face's does; or a server is asked, by the harness's client, with the same tokens.
"""

import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from evaluate_modes import FULL, Mode
from evaluate_results import Cell, figures_of
from evaluate_served import Served
from evaluate_tasks import TaskModel, sampling_of
from evaluate_words import Words
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_ee.errors import FieldError, UserError, did_you_mean
from megatron_ee.inference.llm import LLM

_RESAMPLINGS = 1000
"""For standard errors of what is no mean."""

_MAX_GEN_TOKS = 256
"""Of a task that doesn't say; the harness's own models take as many."""


class Harness:
    """
    Args:
        names: of tasks or groups.
        include_path: of a folder with tasks of one's own.
        limit: so many questions of each task; None: all.
        num_fewshot: examples before a question; None: as the task says.

    Raises:
        FieldError: there is no such task.
    """

    def __init__(
        self, names: Sequence[str], *, include_path: Path | None, limit: int | None, num_fewshot: int | None
    ) -> None:
        if include_path is not None and not include_path.is_dir():
            raise FieldError("--include-path", f"{include_path} is not a folder")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.names, self._limit, self._num_fewshot = tuple(names), limit, num_fewshot
        self._manager = TaskManager(include_path=None if include_path is None else str(include_path))
        for name in names:
            if name not in self._manager.all_tasks:
                near = did_you_mean(name, self._manager.all_tasks)
                raise FieldError("--tasks", f"{name!r} is no task of the harness's, nor in --include-path{near}")

    @property
    def digest(self) -> str:
        """Says whether the same questions are asked."""
        return f"lm_eval {version('lm_eval')}, limit {self._limit}, num_fewshot {self._num_fewshot}"

    def cells(
        self, asked: LLM | Served, modes: Sequence[Mode], known: Mapping[tuple[str, str, str], Cell]
    ) -> Iterator[Cell]:
        """Those that are not known yet, as they come. A mode that says what full depth says is not run: its cell is
        full depth's, with a note.

        Args:
            asked: a server scores at full depth, whatever the mode.

        Raises:
            UserError: a task asks for what the model cannot do, or the server refuses.
        """
        known = dict(known)
        for name in self.names:
            for mode in modes:
                if ("task", name, mode.name) in known:
                    continue
                full = known.get(("task", name, FULL))
                if full is not None and (note := _same_as_full(mode, full.requests, asked)):
                    cell = replace(full, mode=mode.name, note=note)
                else:
                    cell = self._run(name, mode, asked)
                    cell = replace(cell, note=_same_as_full(mode, cell.requests, asked))
                known["task", name, mode.name] = cell
                yield cell

    def _run(self, name: str, mode: Mode, asked: LLM | Served) -> Cell:
        with _naming(f"{name}, {mode.name}", asked), _quiet():
            model = _InProcess(asked, mode) if isinstance(asked, LLM) else _OfServer(asked, mode)
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=[name],
                limit=self._limit,
                num_fewshot=self._num_fewshot,
                task_manager=self._manager,
                bootstrap_iters=_RESAMPLINGS,
                log_samples=False,
                gen_kwargs=model.gen_kwargs,
            )
        figures, errors = figures_of(found["results"], name)
        depths = dict(sorted(model.depths.items()))
        count = sum(depths.values())
        mean = sum(layer * tokens for layer, tokens in depths.items()) / count if count else None
        return Cell("task", name, mode.name, figures, mean, depths, errors, dict(model.requests))


class _InProcess(TemplateLM):
    """The harness's interface around a `TaskModel`.

    Attributes:
        requests: kind -> how many were asked.
        gen_kwargs: what a task's settings of decoding lack: nothing.
    """

    gen_kwargs = None

    def __init__(self, llm: LLM, mode: Mode) -> None:
        super().__init__()
        self._model, self._words = TaskModel(llm, mode), Words(llm.model.tokenizer, llm.model.begin)
        self.requests = Counter[str]()

    @property
    def depths(self) -> Counter[int]:
        return self._model.depths

    @property
    def max_length(self) -> int:
        return self._model.max_length

    @property
    def eot_token_id(self) -> int:
        return self._words.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        return self._words.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        return self._words.encode(string, with_begin=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.requests["loglikelihood"] += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self.requests["loglikelihood_rolling"] += len(requests)
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._model.score([window for own in windows for window in own]))
        return [sum(next(scores).log_probability for _ in own) for own in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self.requests["generate_until"] += len(requests)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        return self._model.generate(contexts, [sampling_of(_settings(request)) for request in requests])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [*self._model.score([(context, answer) for _, context, answer in requests])]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Each token once, after as many as fit before it."""
        tokens, length = self.tok_encode(text), self.max_length
        for window in get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=length, context_len=1
        ):
            yield make_disjoint_window(window)


class _OfServer(LocalCompletionsAPI):
    """The harness's client, which sends the tokens that the checkpoint's own tokenizer makes.

    Attributes:
        requests: kind -> how many were asked.
        gen_kwargs: what a task's settings of decoding lack: how the server is to use exits.
    """

    def __init__(self, of: Served, mode: Mode) -> None:
        super().__init__(
            model=of.model,
            base_url=f"{of.url}/v1/completions",
            tokenizer_backend=None,
            max_length=of.max_length + 1,
            num_concurrent=of.concurrent,
            eos_string=of.words.end,
        )
        self._words, self.tokenizer, self.tokenized_requests = of.words, of.words.tokenizer, True
        self.requests, self.depths = Counter[str](), Counter[int]()
        self.gen_kwargs = {"early_exit": mode.asked}

    @property
    def eot_token_id(self) -> int:
        return self._words.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        return self._words.prefix

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **_kwargs: Any) -> Any:
        """Of one text; or of several, which are to be continued, and begin as texts do."""
        if isinstance(string, str):
            return self._words.encode(string, with_begin=add_special_tokens is not False)
        return [self._words.encode(text) for text in string]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.requests["loglikelihood"] += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self.requests["loglikelihood_rolling"] += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self.requests["generate_until"] += len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str]:
        """The harness's own, and how deep the tokens went."""
        for output in outputs if isinstance(outputs, list) else [outputs]:
            for choice in output["choices"]:
                self.depths.update(choice["early_exit"]["exit_layers"])
        return LocalCompletionsAPI.parse_generations(outputs, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars, where nobody looks."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _naming(where: str, asked: LLM | Served) -> Iterator[None]:
    """Errors that a user can put right, with what was asked; of a server, whatever the client raises."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except ModuleNotFoundError as error:
        if isinstance(asked, LLM):
            raise
        raise FieldError("--server", "needs the harness's client: pip install 'megatron-ee[eval]'") from error
    except Exception as error:
        if isinstance(asked, LLM):
            raise
        raise UserError(f"{where}: {asked.url} does not answer as it should ({error})") from error


def _same_as_full(mode: Mode, requests: Mapping[str, int], asked: LLM | Served) -> str:
    """Why the mode says what full depth says, of such requests; empty: it may say something else."""
    if mode.name == FULL or requests.get("generate_until"):
        return ""
    if mode.exit.mode == "speculative":
        return "full depth's: drafts change no score"
    return "" if isinstance(asked, LLM) else "full depth's: a server scores nothing else"


def _settings(request: Instance) -> dict[str, Any]:
    """A task's `generation_kwargs`, under one name each."""
    return dict(normalize_gen_kwargs(dict(request.args[1]), _MAX_GEN_TOKS))
