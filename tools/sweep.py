"""Find the settings that pay for a model and prompts of one's own: sweep.py SWEEP --checkpoint RUN ...

    python tools/sweep.py speculation --checkpoint RUN --prompts FILE    which exit drafts, and how far
    python tools/sweep.py thresholds --checkpoint RUN --prompts FILE     when which exits fire
    python tools/sweep.py sled --checkpoint RUN [--text FILE]            how far exits correct full depth's choice

Prints a table and the best setting, and writes them into a folder: SWEEP.json with all figures, SWEEP.yaml with the
best setting, which is a config for python -m megatron_ee.inference, and a picture, SWEEP.png. What is not swept is as
the run's config or a named one says, and overrides change it: inference.sampling.max_new_tokens=64. Prompts are decoded
greedily, inference.max_batch_size at a time, and settings take turns with full depth: a speed is a median over rounds.
Where nothing is better than full depth by more than chance, the best setting is mode full.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from compare_measures import cut, held_out, pictures_of, read_text
from sweep_results import Files, Swept, check_folder, fragment, write

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.errors import UserError
from megatron_ee.inference.__main__ import split_settings
from megatron_ee.inference.asking import Prompt
from megatron_ee.inference.llm import LLM, open_model
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.prompts import read_prompts
from megatron_ee.log import quiet_dependencies

Number = TypeVar("Number", int, float)

ROUNDS = 7
SEQUENCES = 64
PROMPTS = "one a line that is not blank; or a .jsonl of objects with `prompt`, a text or a list of tokens"

SWEEPS = ("speculation", "thresholds", "sled")
GOES_WITH = {
    "prompt": SWEEPS[:2],
    "prompts": SWEEPS[:2],
    "exits": SWEEPS[:2],
    "rounds": SWEEPS[:2],
    "lengths": ("speculation",),
    "thresholds": ("thresholds",),
    "agreement": ("thresholds",),
    "text": ("sled",),
    "sequences": ("sled",),
    "alphas": ("sled",),
    "top_k": ("sled",),
}
"""Options that not every sweep has."""


def main() -> int:
    arguments = _parse()
    config_file, overrides = split_settings(arguments.settings)
    quiet_dependencies()
    try:
        prompts = _prompts(arguments)
        folder = find_model(arguments.checkpoint)
        output = arguments.output or pictures_of(folder)
        check_folder(output)
        with open_decoding_config(folder, overrides, config_file=config_file) as config:
            llm = LLM.of(open_model(folder, config), config)
            if not llm.model.exits:
                raise UserError(f"{folder}: the model has no early exit")
            swept = _sweep(llm, prompts, arguments)
            report(output, llm, swept, arguments)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def report(output: Path, llm: LLM, swept: Swept, arguments: argparse.Namespace) -> None:
    """Print the table and the best setting, and write the files."""
    files = Files.of(output, arguments.sweep, arguments.picture)
    print(*swept.lines, sep="\n", end="\n\n")
    print(fragment(swept.best))
    write(files, llm.config, swept)
    print(f"python -m megatron_ee.inference {files.fragment} --checkpoint {arguments.checkpoint} --prompt TEXT")
    print(files.json)
    try:
        from sweep_picture import save_picture
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: it needs matplotlib: pip install 'megatron-ee[plots]'", file=sys.stderr)
        return
    save_picture(files.picture, swept.panels, title=f"{arguments.sweep}: {arguments.checkpoint}")
    print(files.picture)


def _sweep(llm: LLM, prompts: list[Prompt], arguments: argparse.Namespace) -> Swept:
    if arguments.sweep == "speculation":
        import sweep_speculation

        lengths = arguments.lengths or sweep_speculation.LENGTHS
        return sweep_speculation.sweep(
            llm, prompts, exits=arguments.exits, lengths=lengths, rounds=arguments.rounds or ROUNDS
        )
    if arguments.sweep == "sled":
        return _sweep_sled(llm, arguments)
    import sweep_thresholds

    return sweep_thresholds.sweep(
        llm,
        prompts,
        exits=arguments.exits,
        thresholds=arguments.thresholds or sweep_thresholds.THRESHOLDS,
        least_agreement=sweep_thresholds.AGREEMENT if arguments.agreement is None else arguments.agreement,
        rounds=arguments.rounds or ROUNDS,
    )


def _sweep_sled(llm: LLM, arguments: argparse.Namespace) -> Swept:
    import sweep_corrections  # imports megatron-core, which needs a chosen device

    tokenizer = llm.model.tokenizer
    text = read_text(arguments.text, tokenizer) if arguments.text else held_out(llm.config, tokenizer)
    windows_BS = cut(text, llm.config.data.sequence_length, arguments.sequences or SEQUENCES)
    return sweep_corrections.sweep(
        llm,
        windows_BS,
        alphas=arguments.alphas or sweep_corrections.ALPHAS,
        top_ks=arguments.top_k or sweep_corrections.TOP_KS,
    )


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    prompts: list[Prompt] = [*(arguments.prompt or ())]
    for path in arguments.prompts or ():
        prompts += read_prompts(path)
    return prompts


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=SWEEPS, metavar="SWEEP", help=", ".join(SWEEPS))
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run, a step or a Hugging Face folder")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="instead of the run's pictures/")
    parser.add_argument("--picture", choices=("png", "svg"), default="png")
    timed = parser.add_argument_group("speculation and thresholds")
    timed.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    timed.add_argument("--prompts", action="append", type=Path, metavar="FILE", help=PROMPTS)
    timed.add_argument("--exits", type=_numbers(int), metavar="L,L,...", help="layers; default: all that may fire")
    timed.add_argument("--rounds", type=_whole, metavar="N", help=f"that count; one more comes before ({ROUNDS})")
    speculation = parser.add_argument_group("speculation")
    speculation.add_argument("--lengths", type=_numbers(int), metavar="N,N,...", help="tokens drafted at a time")
    thresholds = parser.add_argument_group("thresholds")
    thresholds.add_argument("--thresholds", type=_numbers(float), metavar="X,X,...")
    thresholds.add_argument("--agreement", type=_share, metavar="X", help="least share of full depth's tokens (0.95)")
    sled = parser.add_argument_group("sled")
    sled.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, instead of the run's validation split")
    sled.add_argument("--sequences", type=_whole, metavar="N", help=f"of data.sequence_length tokens ({SEQUENCES})")
    sled.add_argument("--alphas", type=_numbers(float), metavar="X,X,...", help="evolution rates")
    sled.add_argument("--top-k", type=_numbers(int), metavar="N,N,...", help="evolution scales")
    parser.add_argument("settings", nargs="*", metavar="[CONFIG] key.path=value")
    arguments = parser.parse_intermixed_args()
    for name, sweeps in GOES_WITH.items():
        if getattr(arguments, name) is not None and arguments.sweep not in sweeps:
            parser.error(f"--{name.replace('_', '-')} goes with {' and '.join(sweeps)}, not with {arguments.sweep}")
    if arguments.sweep != "sled" and not (arguments.prompt or arguments.prompts):
        parser.error("give prompts, by --prompt or --prompts")
    return arguments


def _numbers(kind: type[Number]) -> Callable[[str], tuple[Number, ...]]:
    def parsed(text: str) -> tuple[Number, ...]:
        return tuple(dict.fromkeys(sorted(kind(part) for part in text.split(","))))

    parsed.__name__ = "list of numbers"  # what argparse calls it
    return parsed


def _whole(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
