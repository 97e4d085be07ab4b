"""Make a run of a Hugging Face model, or a Hugging Face model of a run: convert_hf.py import SRC DST | export SRC DST

`import` writes a run folder: it can be decoded and evaluated, exits can be tuned onto it, and other runs can begin with
it (checkpoint.initial). `export` writes a folder that transformers loads without code of ours; early exits lie beside
the model, in exits.json and exits.safetensors, and `import` brings them back. Parameters stay what they are, bit for
bit. DST must not exist; it appears when it is complete.
"""

import argparse
import signal
import sys
from pathlib import Path

from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    """Returns the exit status: 2 when the user has to change something."""
    arguments = _parse()
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: what is written so far is removed
    quiet_dependencies()
    try:
        choose_device("cpu")
        return _import(arguments) if arguments.command == "import" else _export(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {arguments.destination} is not written", file=sys.stderr)
        return 130


def _import(arguments: argparse.Namespace) -> int:
    from megatron_ee.checkpoint.from_huggingface import import_model

    imported = import_model(arguments.source, arguments.destination, tokenizer=arguments.tokenizer)
    described = imported.source.described
    print(f"{described.architecture}, {imported.source.precision}, tokenizer {imported.tokenizer}")
    if imported.source.exits.layers:
        print(f"exits {', '.join(map(str, imported.source.exits.layers))}")
    print(imported.folder)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from megatron_ee.checkpoint.to_huggingface import export_model  # imports megatron-core: needs a chosen device
    from megatron_ee.huggingface.writing import parse_size

    exported = export_model(
        arguments.source,
        arguments.destination,
        exit_layer=arguments.exit,
        shard_size=parse_size(arguments.shard_size),
    )
    print(f"{exported.architecture} of {exported.step}")
    if exported.exits:
        print(f"exits {', '.join(map(str, exported.exits))} beside it")
    print(exported.folder)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_ours = commands.add_parser("import", help="write a run folder")
    to_ours.add_argument("source", type=Path, metavar="SRC", help="a model's folder: config.json and safetensors")
    to_ours.add_argument("destination", type=Path, metavar="DST", help="the run folder to write")
    to_ours.add_argument("--tokenizer", help="bytes, a tokenizer.json or a tokenizer's folder; default: SRC's own")
    to_theirs = commands.add_parser("export", help="write a folder of Hugging Face's")
    to_theirs.add_argument("source", type=Path, metavar="SRC", help="a run folder (its newest) or a step folder")
    to_theirs.add_argument("destination", type=Path, metavar="DST", help="the folder to write")
    to_theirs.add_argument("--exit", type=int, metavar="E", help="only the model that ends at the exit after layer E")
    to_theirs.add_argument("--shard-size", default="5GB", help="of each file of tensors, at most; default: 5GB")
    return parser.parse_args()


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
