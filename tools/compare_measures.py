"""Hold the measures that decide exits against each other, at equal mean depth: compare_measures.py CHECKPOINT

All tokens of held-out text are run once through all layers, teacher-forced, and every threshold is tried on what the
exits say. Prints, for each measure that the model has, the share of tokens on which early exits choose as full depth
does, at several mean depths; how often an exit is right about the text where the final one is wrong, and the other way
round; and how well gates are calibrated. Writes RUN/pictures/measures.json, and measures.png beside it.

A gate that was trained with false_exit_cost c says r / (r + c (1 - r)) where its exit is right with probability r;
its calibration is that of the r that this stands for. Depth counts layers alone: gates and cosines also spare the
vocabulary product of every exit that does not fire.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from exit_curves import Curve, Reliability, curve_of, depths_between, reliability_of, without_cost

from megatron_ee.checkpoint.description import read_description
from megatron_ee.checkpoint.folders import find_model, is_huggingface
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.log import quiet_dependencies
from megatron_ee.tokenizer import Tokenizer

if TYPE_CHECKING:
    from exit_observations import Observed

    from megatron_ee.inference.opened import OpenedModel

_NO_PLUGINS = ("plugins=[]", "inference.exit.measure=max_probability")  # a checkpoint's config may name code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest), a step or Hugging Face folder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, instead of the run's validation split")
    parser.add_argument("--sequences", type=int, default=64, metavar="N", help="of data.sequence_length tokens (64)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .json, instead of the run's own")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        folder = find_model(arguments.checkpoint)
        output = arguments.output or pictures_of(folder) / "measures.json"
        with open_decoding_config(folder, _NO_PLUGINS) as config:
            device = choose_device(config.device)
            from exit_observations import observe  # imports megatron-core, which needs a chosen device

            from megatron_ee.inference.loading import load_model

            model = load_model(folder, config, device)
            gate_loss = (config if is_huggingface(folder) else read_description(folder)).exits.gate_loss
            if not model.exits:
                raise UserError(f"{folder}: the model has no early exit to compare measures of")
            text = read_text(arguments.text, model.tokenizer) if arguments.text else held_out(config, model.tokenizer)
            windows_BS = cut(text, config.data.sequence_length, arguments.sequences)
            observed = observe(model, windows_BS)
        report(model, observed, output, cost=gate_loss.false_exit_cost, target=gate_loss.target)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def pictures_of(folder: Path) -> Path:
    """The run's.

    Raises:
        UserError: the folder is Hugging Face's, which is left as it is.
    """
    if is_huggingface(folder):
        raise UserError(f"{folder} is no run's: say where the figures go: --output")
    return folder.parents[1] / "pictures"


def read_text(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Its tokens.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    return np.array(tokenizer.encode(text), dtype=np.int64)


def held_out(config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of the validation split's documents, of all of the config's datasets.

    Raises:
        FieldError: a dataset is missing or of another tokenizer, or the split has no documents.
    """
    from megatron_ee.data.dataset import check_sources, sources_of, write_built_in
    from megatron_ee.data.indexed import bin_path

    sources = sources_of(config.data, tokenizer)
    write_built_in(sources, tokenizer)
    bounds = list(accumulate(share / sum(config.data.split) for share in config.data.split))
    parts = []
    for source, index in zip(sources, check_sources(sources, config, tokenizer), strict=True):
        first, stop = (round(bound * len(index.lengths)) for bound in bounds[:2])
        start, size = int(index.lengths[:first].sum()), int(index.lengths[first:stop].sum())
        tokens = np.memmap(bin_path(source.prefix), dtype=index.dtype, mode="r", shape=(index.num_tokens,))
        parts.append(np.asarray(tokens[start : start + size], dtype=np.int64))
    if not sum(map(len, parts)):
        raise FieldError("data.split", "leaves no documents for validation; give a text: --text FILE")
    return np.concatenate(parts)


def cut(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """At most so many windows of `length` tokens and the one after, evenly spread, none over another.

    Raises:
        UserError: the text is shorter than one.
    """
    available = (len(tokens) - 1) // length
    if available < 1 or count < 1:
        raise UserError(f"{len(tokens)} tokens of text make no sequence of {length}, or --sequences is below 1")
    starts = np.unique(np.linspace(0, available - 1, min(count, available)).astype(int)) * length
    return np.stack([tokens[start : start + length + 1] for start in starts])


def report(model: "OpenedModel", observed: "Observed", output: Path, *, cost: float, target: str) -> None:
    """Print the tables, and write both files."""
    from exit_observations import exits_asked

    exits, num_layers = list(model.exits), model.stage.model.num_layers
    asked = exits_asked(model)
    curves = {
        name: curve_of(confidences_EN, observed.agrees_EN[_rows(asked[name], exits)], asked[name], num_layers)
        for name, confidences_EN in observed.confidences_EN.items()
    }
    right_EN = observed.agrees_EN if target == "final" else observed.correct_EN
    gates = {
        layer: reliability_of(without_cost(of_gate_N, cost), right_EN[exits.index(layer)])
        for layer, of_gate_N in zip(asked.get("gate", ()), observed.confidences_EN.get("gate", ()), strict=True)
    }
    depths = depths_between(max(layers[0] for layers in asked.values()), num_layers)
    _print_curves(curves, depths, observed.agrees_EN, exits)
    _print_against_the_text(against_the_text(observed, exits))
    _print_gates(gates, target, cost)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = _as_json(curves, gates, depths, num_tokens=observed.agrees_EN.shape[1], target=target)
    content["against_the_text"] = against_the_text(observed, exits)
    output.write_text(json.dumps(content, indent=1) + "\n")
    print(output)
    try:
        from measures_picture import save_picture
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: it needs matplotlib: pip install 'megatron-ee[plots]'", file=sys.stderr)
        return
    picture = output.with_suffix(".png")
    save_picture(picture, curves, gates, title="early exits against full depth")
    print(picture)


def against_the_text(observed: "Observed", exits: list[int]) -> dict[str, dict[str, float]]:
    """By exit: the shares of tokens on which it alone is right, or the final exit alone."""
    final_N = observed.final_correct_N
    return {
        str(layer): {"only_exit": float((own_N & ~final_N).mean()), "only_final": float((final_N & ~own_N).mean())}
        for layer, own_N in zip(exits, observed.correct_EN, strict=True)
    }


def _print_against_the_text(shares: Mapping[str, Mapping[str, float]]) -> None:
    for layer, of in shares.items():
        alone = f"full depth alone on {of['only_final']:.2%}"
        print(f"exit {layer} alone is right about the text on {of['only_exit']:.2%} of tokens, {alone}")
    print()


def _rows(layers: list[int], exits: list[int]) -> list[int]:
    return [exits.index(layer) for layer in layers]


def _print_curves(curves: Mapping[str, Curve], depths: list[float], agrees_EN: np.ndarray, exits: list[int]) -> None:
    shares = ", ".join(f"{layer}: {share:.1%}" for layer, share in zip(exits, agrees_EN.mean(1), strict=True))
    print(f"{agrees_EN.shape[1]} tokens; agreement with full depth by exit: {shares}\n")
    print(f"{'mean depth':<12}" + "".join(f"{name:>18}" for name in curves) + "   agreement with full depth")
    columns = [curve.at(depths) for curve in curves.values()]
    for depth, *values in zip(depths, *columns, strict=True):
        print(f"{depth:<12.2f}" + "".join(f"{value:>18.1%}" for value in values))
    print()


def _print_gates(gates: Mapping[int, Reliability], target: str, cost: float) -> None:
    for layer, (counts, confidences, shares, error) in gates.items():
        right = "the final exit's token" if target == "final" else "the label"
        print(f"gate of exit {layer}, cost {cost:g} taken out: calibration error {error:.3f} (right: {right})")
        print(f"{'tokens':>10}{'sure':>10}{'right':>10}")
        for count, confidence, share in zip(counts, confidences, shares, strict=True):
            print(f"{count:>10}{confidence:>10.1%}{share:>10.1%}")
        print()


def _as_json(
    curves: Mapping[str, Curve], gates: Mapping[int, Reliability], depths: list[float], *, num_tokens: int, target: str
) -> dict[str, Any]:
    return {
        "tokens": num_tokens,
        "curves": {
            name: {key: values.tolist() for key, values in curve._asdict().items()} for name, curve in curves.items()
        },
        "at_mean_depth": {"depth": depths} | {name: curve.at(depths) for name, curve in curves.items()},
        "gates": {str(layer): {"target": target, **of_gate._asdict()} for layer, of_gate in gates.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
