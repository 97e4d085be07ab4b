"""Continue prompts: python -m megatron_ee.inference --checkpoint RUN --prompt TEXT [inference.exit.threshold=0.8 ...]

The run's own config says how (its `inference` section), or a config that is named first; overrides change it. The
checkpoint may be a Hugging Face folder; to one without exits of its own, exits.layers and exits.norm=shared give some.
Prompts are decoded together and printed with their texts, in their order, and a table says what the exits did. With
--compare, they are continued at full depth and at several thresholds, and a table shows what exits gain and cost.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.errors import FieldError, StageLostError, UserError
from megatron_ee.exit_status import is_first_of_node, leave_status
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.command import Session
from megatron_ee.inference.comparison import compare
from megatron_ee.inference.decoding_record import Recorder, write_record
from megatron_ee.inference.llm import LLM, open_model
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.prompts import read_prompts
from megatron_ee.log import quiet_dependencies

_CHECKPOINT = "a run folder (its newest), a step folder or a Hugging Face folder"
_PROMPTS = "one a line that is not blank; or a .jsonl of objects with `prompt`, a text or a list of tokens"
_INTERACTIVE = "continue each line that is typed; Ctrl-C ends a text, Ctrl-D the session"
_OUTPUT = "write texts, tokens and depths there, a line of JSON for each prompt, instead of printing them"
_RECORD = "write there what the stages of a pipeline did when, for tools/show_schedule.py --decoding"
_DEPTHS = "write there how many tokens came out after which layer, for inference.parallel.layout=survival"


def main() -> int:
    status = _run_all(_parse())
    leave_status(status)
    return status


def _run_all(arguments: argparse.Namespace) -> int:
    config_file, overrides = split_settings(arguments.settings)
    quiet_dependencies()
    try:
        prompts: list[Prompt] = [*arguments.prompt]
        for path in arguments.prompts:
            prompts += read_prompts(path)
        folder = find_model(arguments.checkpoint)
        with open_decoding_config(folder, overrides, config_file=config_file) as config:
            if arguments.stages:
                print(config.inference.parallel.pipeline)
                return 0
            recorder = Recorder() if arguments.record else None
            if recorder is not None and config.inference.parallel.pipeline == 1:
                raise FieldError("inference.parallel.pipeline", "1, and --record notes what several stages do")
            llm = LLM.of(open_model(folder, config), config, recorder=recorder)
            with _one_speaks(llm):
                if arguments.compare:
                    compare(llm, prompts, all_policies=arguments.kv_policies)
                else:
                    _run(Session(llm), prompts, arguments.output, arguments.depths)
            if recorder is not None and llm.is_first:
                write_record(arguments.record, recorder.record)
    except StageLostError as error:
        print(error, file=sys.stderr)
        sys.stdout.flush()
        leave_status(2)
        os._exit(2)
    except UserError as error:
        if is_first_of_node():
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def split_settings(settings: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A config's path, if that comes first, and overrides."""
    if settings and "=" not in settings[0]:
        return Path(settings[0]), list(settings[1:])
    return None, list(settings)


@contextmanager
def _one_speaks(llm: LLM) -> Iterator[None]:
    """Of processes that torchrun started together, which all decode the same, only the first one prints."""
    if llm.is_first:
        yield
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield


def _run(session: Session, prompts: Sequence[Prompt], output: Path | None, depths: Path | None) -> None:
    if not prompts:
        session.converse()
    elif output is None:
        session.show(prompts)
    else:
        session.write(prompts, output)
    if depths is not None:
        session.write_depths(depths)
    session.close()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help=_CHECKPOINT)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", action="append", default=[], type=Path, metavar="FILE", help=_PROMPTS)
    parser.add_argument("--interactive", action="store_true", help=_INTERACTIVE)
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help=_OUTPUT)
    parser.add_argument("--depths", type=Path, metavar="FILE.json", help=_DEPTHS)
    parser.add_argument("--stages", action="store_true", help="print the number of stages, and do no more")
    parser.add_argument("--record", type=Path, metavar="FILE.json", help=_RECORD)
    parser.add_argument("--compare", action="store_true", help="full depth against exits, for several thresholds")
    parser.add_argument("--kv-policies", action="store_true", help="with --compare: every KV policy, too")
    parser.add_argument("settings", nargs="*", metavar="[CONFIG] key.path=value")
    arguments = parser.parse_intermixed_args()
    has_prompts = bool(arguments.prompt or arguments.prompts)
    if has_prompts == arguments.interactive:
        parser.error("give prompts, by --prompt or --prompts, or --interactive")
    if arguments.interactive and (arguments.compare or arguments.output or arguments.depths):
        parser.error("--interactive goes with none of --compare, --output and --depths")
    if arguments.compare and (arguments.output or arguments.depths or arguments.record):
        parser.error("--compare prints a table and writes none of --output, --depths and --record")
    if arguments.kv_policies and not arguments.compare:
        parser.error("--kv-policies goes with --compare")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
