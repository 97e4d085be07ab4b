"""What a model's exits are worth in loss, accuracy and answers: evaluate.py CHECKPOINT [key.path=value ...]

    python tools/evaluate.py RUN                           the run's validation split
    python tools/evaluate.py RUN --text FILE --text FILE   texts of one's own
    python tools/evaluate.py RUN --tasks a,b               tasks of lm-evaluation-harness, in process
    python tools/evaluate.py RUN --tasks a,b --server URL  the same, asked of a running server

Texts are given to the model (teacher-forced): loss, perplexity and accuracy of every exit, and of what early exit says
at each threshold, which is what decoding with exact keys and values says. Tasks are scored in the same way, and decoded
where they ask for texts. Other settings of exits are the config's: inference.exit.measure=margin.

Prints a table, and leaves it in the run's pictures/ or in --output FOLDER, as evaluation.json, .md and .png. Each
figure is in the json once it is known, and is not measured again: a run that was stopped goes on by the same command.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import evaluate_modes
from compare_measures import cut, held_out, pictures_of, read_text
from evaluate_modes import Mode, modes_of
from evaluate_results import Cell, Results, Setting, markdown, tables, text_of, write_whole
from sweep_results import check_folder
from sweep_timing import progress

from megatron_ee.checkpoint.description import hash_of, read_description
from megatron_ee.checkpoint.fingerprint import fingerprint
from megatron_ee.checkpoint.folders import find_model, is_huggingface
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.llm import LLM, open_model
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:
    from evaluate_harness import Harness
    from evaluate_served import Served
    from evaluate_texts import Text

Item = TypeVar("Item", str, float)

VALIDATION = "validation"
SEQUENCES = 64
NAME = "evaluation"


def main() -> int:
    arguments = _parse()
    quiet_dependencies()
    path = None
    try:
        folder = find_model(arguments.checkpoint)
        output = arguments.output or pictures_of(folder)
        check_folder(output)
        path = output / f"{NAME}.json"
        with open_decoding_config(folder, arguments.settings, config_file=arguments.config) as config:
            modes = modes_of(arguments.modes, arguments.thresholds, config.inference.exit)
            choose_device("cpu" if arguments.server else config.device)  # before megatron-core is imported
            harness = _harness(arguments) if arguments.tasks else None
            evaluation = Evaluation(folder, config, modes, arguments, harness)
            results = evaluation.results(path)
            evaluation.run(results)
        report(results, arguments.checkpoint)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = path is not None and path.exists()
        left = f"{path} has what is done, and the same command goes on from there" if kept else "nothing is done yet"
        print(f"stopped; {left}", file=sys.stderr)
        return 130
    return 0


class Evaluation:
    """Of one checkpoint, by what the command line asks for.

    Args:
        harness: with the tasks; None: there is none.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        modes: Sequence[Mode],
        arguments: argparse.Namespace,
        harness: "Harness | None",
    ) -> None:
        self._folder, self._config, self._modes, self._arguments = folder, config, modes, arguments
        self._harness = harness
        self._asked = _asked(folder, config, arguments.server)
        self._texts = self._read_texts(self._asked) if isinstance(self._asked, LLM) else []

    def results(self, path: Path) -> Results:
        """The file, with what it has already."""
        shared = self._config.inference.exit.model_dump(mode="json", exclude={"mode", "threshold", "thresholds"})
        path_and_hash = str(self._folder), _hash_of(self._folder)
        setting = Setting(*path_and_hash, self._model, shared, self._arguments.server)
        subjects = {text.name: text.digest for text in self._texts}
        if self._harness is not None:
            subjects |= dict.fromkeys(self._harness.names, self._harness.digest)
        return Results(path, setting, subjects, again=self._arguments.again)

    def run(self, results: Results) -> None:
        """All that is not in the file yet."""
        for text in self._texts:
            self._run_text(text, results)
        if self._harness is not None:
            for cell in self._harness.cells(self._asked, self._modes, results.cells):
                results.keep([cell])
                _say(cell)

    def _run_text(self, text: "Text", results: Results) -> None:
        from evaluate_texts import evaluate_text, rows_of

        assert isinstance(self._asked, LLM)
        model = self._asked.model
        wanted = [name for name in rows_of(model.exits, self._modes) if ("text", text.name, name) not in results]
        if not wanted:
            return
        with progress(text.windows_BS[:, 1:].size, f"{text.name} (tokens)") as done:
            cells = evaluate_text(model, text, self._modes, wanted, done)
        results.keep(cells)
        for cell in cells:
            _say(cell)

    @property
    def _model(self) -> dict[str, Any]:
        """What a config may say of the model."""
        if isinstance(self._asked, LLM):
            exits, tokenizer = self._asked.model.exits, self._asked.model.tokenizer
        else:
            exits, tokenizer = self._asked.exits, self._asked.words.tokenizer
        return {"exits": list(exits), "norm": self._config.exits.norm, "tokenizer": tokenizer.name}

    def _read_texts(self, llm: LLM) -> list["Text"]:
        """
        Raises:
            FieldError: two files have one name, or the validation split has no documents.
        """
        from evaluate_texts import Text  # imports megatron-core, which needs a chosen device

        tokenizer, arguments = llm.model.tokenizer, self._arguments
        tokens = {path.name: read_text(path, tokenizer) for path in arguments.text}
        if len(tokens) < len(arguments.text):
            raise FieldError("--text", "two files have the same name, which is what their figures are kept by")
        if arguments.validation or not (tokens or arguments.tasks):
            tokens = {VALIDATION: held_out(self._config, tokenizer), **tokens}
        length, count = self._config.data.sequence_length, arguments.sequences
        return [Text(name, cut(of, length, count)) for name, of in tokens.items()]


def report(results: Results, checkpoint: Path) -> None:
    """Print the tables, and write them and the picture beside the figures."""
    cells = results.ordered()
    print(*tables(cells), sep="\n", end="\n\n")
    page, picture = results.path.with_suffix(".md"), results.path.with_suffix(".png")
    write_whole(page, markdown(f"Evaluation of {checkpoint}", cells))
    print(results.path, page, sep="\n")
    try:
        from evaluate_picture import save_picture
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: it needs matplotlib: pip install 'megatron-ee[plots]'", file=sys.stderr)
        return
    if save_picture(picture, cells, title=str(checkpoint)):
        print(picture)


def _asked(folder: Path, config: Config, server: str | None) -> "LLM | Served":
    if server is None:
        return LLM.of(open_model(folder, config), config)
    from evaluate_served import reach

    return reach(server, folder, config)


def _harness(arguments: argparse.Namespace) -> "Harness":
    """
    Raises:
        FieldError: lm-evaluation-harness is not installed, or has no such task.
    """
    try:
        from evaluate_harness import Harness
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "lm_eval":
            raise
        raise FieldError("--tasks", "needs lm-evaluation-harness: pip install 'megatron-ee[eval]'") from error
    return Harness(
        arguments.tasks, include_path=arguments.include_path, limit=arguments.limit, num_fewshot=arguments.num_fewshot
    )


def _hash_of(folder: Path) -> str:
    return hash_of(fingerprint(folder)) if is_huggingface(folder) else read_description(folder).hash


def _say(cell: Cell) -> None:
    figures = ", ".join(f"{name} {text_of(name, value)}" for name, value in cell.figures.items())
    print(f"{cell.subject}, {cell.mode}: {figures}", file=sys.stderr)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest), a step or Hugging Face folder")
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of the config that a run has")
    parser.add_argument("--modes", type=_list_of(str), default=evaluate_modes.DEFAULT, metavar="NAME,...", help=_MODES)
    parser.add_argument("--thresholds", type=_list_of(float), default=evaluate_modes.THRESHOLDS, metavar="X,...")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="instead of the run's pictures/")
    parser.add_argument("--again", action="store_true", help="begin anew, whatever figures are there")
    texts = parser.add_argument_group("texts")
    texts.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="UTF-8; several times")
    texts.add_argument("--validation", action="store_true", help="the run's split, beside --text or --tasks")
    texts.add_argument("--sequences", type=_at_least(1), default=SEQUENCES, metavar="N", help=_SEQUENCES)
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", type=_list_of(str), default=(), metavar="NAME,...")
    tasks.add_argument("--include-path", type=Path, metavar="FOLDER", help="with tasks of one's own")
    tasks.add_argument("--limit", type=_at_least(1), metavar="N", help="so many questions of each task")
    tasks.add_argument("--num-fewshot", type=_at_least(0), metavar="N", help="examples before each question")
    tasks.add_argument("--server", metavar="URL", help="of python -m megatron_ee.server, instead of in process")
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    for name in ("include_path", "limit", "num_fewshot", "server"):
        if getattr(arguments, name) is not None and not arguments.tasks:
            parser.error(f"--{name.replace('_', '-')} goes with --tasks")
    if arguments.server and (arguments.text or arguments.validation):
        parser.error("--server answers tasks; texts are evaluated in process, without it")
    return arguments


_MODES = f"{', '.join(evaluate_modes.NAMES)} ({','.join(evaluate_modes.DEFAULT)})"
_SEQUENCES = f"of data.sequence_length tokens, evenly spread over each text ({SEQUENCES})"


def _list_of(kind: Callable[[str], Item]) -> Callable[[str], tuple[Item, ...]]:
    def parsed(text: str) -> tuple[Item, ...]:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))

    parsed.__name__ = "list"  # what argparse calls it
    return parsed


def _at_least(least: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return number

    parsed.__name__ = "number"  # what argparse calls it
    return parsed


if __name__ == "__main__":
    sys.exit(main())
