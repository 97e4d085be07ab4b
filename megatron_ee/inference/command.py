"""What `python -m megatron_ee.inference` does with an open model: texts on a terminal or in a file. No torch here."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_ee.errors import UserError
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.completion import Completion, Piece, completions, in_order
from megatron_ee.inference.exit_depths import write_depths
from megatron_ee.inference.llm import LLM
from megatron_ee.inference.request import Emission, Logprobs
from megatron_ee.inference.savings import savings_of
from megatron_ee.inference.show import DepthPainter, Summary, closing_table
from megatron_ee.inference.work import Work


class Session:
    """Decodes, shows, and closes with a table of all that was decoded."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._before = llm, llm.work
        self._num_layers = llm.model.stage.model.num_layers
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._painter = DepthPainter([*llm.model.exits, self._num_layers], colour=colour)
        self._emissions: list[Emission] = []
        self._num_texts, self._seconds = 0, 0.0

    def show(self, prompts: Sequence[Prompt]) -> None:
        """Print prompts with their texts, in their order: decoded together, and each shown while it comes, or when it
        is its turn."""
        self._print_legend()
        turn = 0
        for piece in self._counted(in_order(self._llm.stream(list(prompts)))):
            if turn == piece.index:
                turn += 1
                print(self._text_of(prompts[piece.index]), end="")
            print(self._painter.paint(piece.text, piece.emission), end="", flush=True)
            if piece.finish_reason is not None:
                print("\n", flush=True)

    def write(self, prompts: Sequence[Prompt], output: Path) -> None:
        """Write a line of JSON for each prompt, in their order, as soon as it is there.

        Raises:
            UserError: the file cannot be written.
        """
        requests, pieces = self._llm.requests(list(prompts)), self._llm.stream(list(prompts))
        self._llm.from_first(lambda: _begin(output))  # the others would wait for one that cannot write
        try:
            with (output if self._llm.is_first else Path(os.devnull)).open("a", encoding="utf-8") as file:
                for index, completion in completions(requests, self._counted(in_order(pieces))):
                    file.write(json.dumps(_record(prompts[index], completion), ensure_ascii=False) + "\n")
                    file.flush()
        except OSError as error:
            raise UserError(f"{output}: {error.strerror}") from error

    def converse(self) -> None:
        """Continue each line that is typed, until there are no more; Ctrl-C ends a text, or between texts all."""
        self._print_legend()
        asks = "> " if sys.stdin.isatty() else ""
        while (prompt := self._llm.from_first(lambda: _ask(asks))) is not None:
            started, before = time.perf_counter(), len(self._emissions)
            try:
                for piece in self._counted(self._llm.stream(prompt)):
                    print(self._painter.paint(piece.text, piece.emission), end="", flush=True)
            except KeyboardInterrupt:
                print(" (stopped)", end="")
            except UserError as error:
                print(error, file=sys.stderr)
                continue
            summary = Summary(self._emissions[before:], time.perf_counter() - started)
            print(f"\n[{summary.line(self._num_layers)}]" if summary.emissions else "")

    def write_depths(self, path: Path) -> None:
        """Write how many tokens came out after which layer, which is what a layout by survival reads.

        Raises:
            UserError: the file cannot be written.
        """
        tokens = Counter(emission.exit_layer for emission in self._emissions)
        if self._llm.is_first:
            write_depths(path, tokens, num_layers=self._num_layers, exit=self._llm.config.inference.exit)

    def close(self) -> None:
        """Print the table."""
        if not self._emissions:
            return
        summary = Summary(self._emissions, self._seconds)
        work: Work = self._llm.work - self._before
        savings = savings_of(work, self._llm.model.facts.weights, num_tokens=len(self._emissions))
        params = self._llm.config.inference.exit
        lines = closing_table(summary, savings, params, num_texts=self._num_texts, num_layers=self._num_layers)
        for line in lines:
            print(line)

    def _counted(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        started = time.perf_counter()
        try:
            for piece in pieces:
                self._emissions.append(piece.emission)
                self._num_texts += piece.finish_reason is not None
                yield piece
        finally:
            self._seconds += time.perf_counter() - started

    def _text_of(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self._llm.model.tokenizer.decode(list(prompt))

    def _print_legend(self) -> None:
        if legend := self._painter.legend():
            print(legend)


def _begin(output: Path) -> None:
    try:
        output.write_text("", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}") from error


def _ask(text: str) -> str | None:
    """A line of input; None at its end.

    Raises:
        UserError: it is no text.
    """
    try:
        return input(text)
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"a line is not UTF-8 at byte {error.start}") from error


def _record(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    record: dict[str, Any] = {
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "exit_layers": completion.exit_layers,
        "confidences": completion.confidences,
        "draft_exits": [emission.draft_exit for emission in completion.emissions],
        "acceptance": completion.acceptance,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.emissions[0].logprobs is not None:
        record["logprobs"] = [_logprobs(emission.logprobs) for emission in completion.emissions]
    if completion.emissions[0].exit_logprobs is not None:
        record["exit_logprobs"] = [
            {layer: _logprobs(of) for layer, of in (emission.exit_logprobs or {}).items()}
            for emission in completion.emissions
        ]
    return record


def _logprobs(of: Logprobs | None) -> dict[str, Any] | None:
    return None if of is None else {"token": of.token, "top": dict(of.top)}
