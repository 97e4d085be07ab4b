"""Thresholds that keep a promise: calibrate_thresholds.py CHECKPOINT [CONFIG] [key.path=value ...]

    python tools/calibrate_thresholds.py runs/demo --target 0.05                  its validation split
    python tools/calibrate_thresholds.py runs/demo --target 0.01,0.05 --prompts prompts.jsonl
    python -m megatron_ee.server --model runs/demo inference.thresholds_file=runs/demo/calibration/thresholds.json

Candidates, from the most careful to the most eager one, decode the same prompts as they would be deployed: with the
config's measure, KV policy, batches and sampling. What they lose against full depth says which are shown to keep the
target: by Learn then Test (arXiv 2110.01052), with a probability of 1 - delta, or on average by conformal risk control
(arXiv 2208.02814). Prompts are shuffled: some choose the candidates, most test them, and others, by which nothing is
chosen, are decoded at the end. Writes thresholds.json (one for each target, where there are several), which
`inference.thresholds_file` deploys for this very checkpoint; calibration.json with all figures; and calibration.html.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from calibration_prompts import Asked, read_asked, split, windows_of
from compare_measures import held_out, read_text
from serving_load import whole
from sweep import PROMPTS
from sweep_results import check_folder

from megatron_ee.checkpoint.folders import find_model, is_huggingface
from megatron_ee.checkpoint.models import hash_of_model
from megatron_ee.errors import FieldError, UserError
from megatron_ee.exit_status import is_first_of_node
from megatron_ee.inference.__main__ import split_settings
from megatron_ee.inference.calibration.thresholds_file import FIELD
from megatron_ee.inference.llm import LLM, open_model
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.log import quiet_dependencies

COUNT, PROMPT_TOKENS, DELTA, TARGET = 1000, 64, 0.1, 0.05
RISKS = {
    "disagreement": "share of tokens that full depth would not have drawn, given the same text before them",
    "difference": "1 - ROUGE-L of the answer and full depth's own",
    "exact_match": "1 where the answer is not the `reference` beside the prompt",
    "words": "1 - F1 of the words of answer and `reference`",
}
METHODS = {
    "hoeffding_bentkus": "Learn then Test by the mean loss",
    "betting": "Learn then Test by every loss: tighter where losses spread little",
    "conformal": "conformal risk control, on average",
}
WAYS = {
    "exits": "each exit its own thresholds, from the prompts that choose",
    "common": "one threshold for all exits",
}
_REFERENCES = ("exact_match", "words")


def main() -> int:
    arguments = _parse()
    quiet_dependencies()
    try:
        _calibrate(arguments)
    except (UserError, OSError) as error:
        if is_first_of_node():
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _calibrate(arguments: argparse.Namespace) -> None:
    config_file, overrides = split_settings(arguments.settings)
    folder = find_model(arguments.checkpoint)
    output = arguments.output or calibrations_of(folder)
    with open_decoding_config(folder, overrides, config_file=config_file) as config:
        inference = config.inference
        if inference.thresholds_file is not None:
            raise FieldError(".".join(map(str, FIELD)), "has thresholds that are found already; set it to null")
        if inference.parallel.pipeline > 1:
            raise FieldError("inference.parallel.pipeline", "stages change no token: calibrate on one")
        llm = LLM.of(open_model(folder, config), config)
        llm.from_first(lambda: check_folder(output))
        from calibration import calibrate  # imports megatron-core, which needs a chosen device
        from calibration_report import Reported, report
        from calibration_results import Terms

        terms = Terms(arguments.risk, arguments.method, arguments.delta)
        parts = split(_asked(llm, arguments), config.seed, arguments.count)
        calibrated = calibrate(llm, parts, terms, arguments.target, arguments.path)
        if llm.is_first:
            of = Reported(folder, hash_of_model(folder), config, parts, terms, calibrated)
            report(output, of)


def calibrations_of(folder: Path) -> Path:
    """Where a run has them.

    Raises:
        UserError: the folder is Hugging Face's, which is left as it is.
    """
    if is_huggingface(folder):
        raise UserError(f"{folder} is no run's: say where thresholds go: --output")
    return folder.parents[1] / "calibration"


def _asked(llm: LLM, arguments: argparse.Namespace) -> Asked:
    if arguments.prompts is not None:
        return read_asked(arguments.prompts, with_references=arguments.risk in _REFERENCES)
    tokenizer = llm.model.tokenizer
    text = read_text(arguments.text, tokenizer) if arguments.text else held_out(llm.config, tokenizer)
    return windows_of(text, arguments.prompt_tokens or PROMPT_TOKENS)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest), a step or Hugging Face folder")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=PROMPTS)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to cut prompts of; default: the run's validation split"
    )
    parser.add_argument("--prompt-tokens", type=whole(1), metavar="N", help=f"of a text's prompts ({PROMPT_TOKENS})")
    parser.add_argument("--count", type=whole(1), default=COUNT, metavar="N", help=f"prompts in all ({COUNT})")
    parser.add_argument("--target", type=_targets, default=(TARGET,), metavar="X,X,...", help=f"risk ({TARGET:g})")
    parser.add_argument("--delta", type=_inside, default=DELTA, metavar="X", help=f"how often it may fail ({DELTA:g})")
    parser.add_argument("--risk", choices=RISKS, default="disagreement", help=_listed(RISKS))
    parser.add_argument("--method", choices=METHODS, default="hoeffding_bentkus", help=_listed(METHODS))
    parser.add_argument("--path", choices=WAYS, default="exits", help=_listed(WAYS))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="instead of the run's calibration/")
    parser.add_argument("settings", nargs="*", metavar="[CONFIG] key.path=value")
    arguments = parser.parse_intermixed_args()
    if arguments.prompts and (arguments.text or arguments.prompt_tokens):
        parser.error("--prompts are prompts; --text and --prompt-tokens go without them")
    if arguments.risk in _REFERENCES and not arguments.prompts:
        parser.error(f"--risk {arguments.risk} needs --prompts FILE.jsonl, with a `reference` beside each prompt")
    return arguments


def _listed(of: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in of.items()).replace("%", "%%")


def _targets(text: str) -> tuple[float, ...]:
    return tuple(sorted({_inside(part) for part in text.split(",")}))


def _inside(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
