"""Continue prompts: python -m megatron_ee.inference --checkpoint RUN --prompt TEXT [inference.exit.threshold=0.8 ...]

The run's own config says how (its `inference` section), or a config that is named first; overrides change it. The
checkpoint may be a Hugging Face folder; to one without exits of its own, exits.layers and exits.norm=shared give some.
With --compare, each prompt is continued at full depth and at several thresholds, and a table shows what exits gain and
what they cost.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.show import DepthPainter, Summary
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:
    from megatron_ee.inference.engine import Engine

_CHECKPOINT = "a run folder (its newest), a step folder or a Hugging Face folder"
COMPARED_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help=_CHECKPOINT)
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--compare", action="store_true", help="full depth against exits, for several thresholds")
    parser.add_argument("settings", nargs="*", metavar="[CONFIG] key.path=value")
    arguments = parser.parse_intermixed_args()
    config_file, overrides = split_settings(arguments.settings)
    quiet_dependencies()
    try:
        folder = find_model(arguments.checkpoint)
        with open_decoding_config(folder, overrides, config_file=config_file) as config:
            device = choose_device(config.device)
            from megatron_ee.inference.engine import load_engine  # imports megatron-core, which needs a chosen device

            engine = load_engine(folder, config, device)
            run = compare if arguments.compare else show
            run(engine, config, arguments.prompt)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def split_settings(settings: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A config's path, if that comes first, and overrides."""
    if settings and "=" not in settings[0]:
        return Path(settings[0]), list(settings[1:])
    return None, list(settings)


def show(engine: "Engine", config: Config, prompts: Sequence[str]) -> None:
    """Print each prompt's continuation as it is decoded."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    num_layers = engine.stage.model.num_layers
    painter = DepthPainter(engine.tokenizer, [*engine.exits, num_layers], colour=colour)
    if legend := painter.legend():
        print(legend)
    for prompt in prompts:
        print(prompt, end="", flush=True)
        emissions, started = [], time.perf_counter()
        for emission in engine.generate(make_request(engine, config, prompt)):
            emissions.append(emission)
            print(painter.paint(emission), end="", flush=True)
        summary = Summary(emissions, time.perf_counter() - started)
        print(f"\n[{summary.line(num_layers)}]\n", flush=True)


def compare(engine: "Engine", config: Config, prompts: Sequence[str]) -> None:
    """Print a table: a row for full depth and for each threshold, over all prompts, decoded greedily.

    `agreement` is the share of tokens that full depth would have chosen too, given the same text before them.
    """
    base = config.inference.exit
    settings = [("full depth", base.model_copy(update={"mode": "full"}))]
    for threshold in COMPARED_THRESHOLDS:
        changed = {"mode": "early_exit", "threshold": threshold, "thresholds": {}}
        settings.append((f"threshold {threshold}", base.model_copy(update=changed)))
    requests = [make_request(engine, config, prompt) for prompt in prompts]
    list(engine.generate(replace(requests[0], max_new_tokens=8, temperature=0)))  # the first tokens are slow
    print(f"{'':16}{'mean depth':>12}{'agreement':>12}{'tokens/s':>12}{'speed':>8}   tokens by exit layer")
    full_speed = None
    for name, params in settings:
        summary, agreement = _measure(engine, [replace(request, temperature=0, exit=params) for request in requests])
        if not summary.emissions:
            print(f"{name:16}no tokens: the text ended at once")
            continue
        full_speed = full_speed or summary.tokens_per_second
        used = ", ".join(f"{layer}: {count}" for layer, count in summary.exits_used().items())
        speed = summary.tokens_per_second
        print(
            f"{name:16}{summary.mean_depth:>12.2f}{agreement:>12.1%}{speed:>12.1f}{speed / full_speed:>7.2f}x   {used}"
        )


def make_request(engine: "Engine", config: Config, prompt: str) -> Request:
    """A request from a prompt and the config's `inference` section; an empty prompt starts a document."""
    return Request(
        prompt=tuple(engine.tokenizer.encode(prompt)) or (engine.tokenizer.eod,),
        max_new_tokens=config.inference.max_new_tokens,
        stop=engine.tokenizer.eod,
        temperature=config.inference.temperature,
        top_k=config.inference.top_k,
        seed=config.seed,
        exit=config.inference.exit,
    )


def _measure(engine: "Engine", requests: Sequence[Request]) -> tuple[Summary, float]:
    """Decode all requests; the share of tokens that full depth agrees with is measured outside the clock."""
    emissions: list[Emission] = []
    seconds, agreed = 0.0, 0
    for request in requests:
        started = time.perf_counter()
        text = list(engine.generate(request))
        seconds += time.perf_counter() - started
        tokens = [emission.token for emission in text]
        choices = engine.full_depth_choices([*request.prompt, *tokens])[len(request.prompt) - 1 : -1]
        agreed += sum(token == choice for token, choice in zip(tokens, choices, strict=True))
        emissions += text
    return Summary(emissions, seconds), agreed / max(1, len(emissions))


if __name__ == "__main__":
    sys.exit(main())
