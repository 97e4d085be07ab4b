"""What is measured once the runs are trained: programs of tools/, each of which leaves a file of figures.

Decoding is measured on the model of `make bench-checkpoint`, of the built-in corpus, which is surer of itself than
the runs on books; corrections on one of these too.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reproduce_corpus import Corpus
from reproduce_runs import ROOT

from megatron_ee.errors import UserError
from megatron_ee.inference.json_files import write_json

TRUNK = Path("runs/bench/checkpoint")
ON_BOOKS = "gates-1"
NUM_COPIES = 256
NAMES = ("decode", "serve", "measures", "sled_code", "sled_books", "corrections_code", "corrections_books")
"""Of all measurements, in the order in which they are made."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One program.

    Attributes:
        name: of the file of figures that it leaves, without .json.
        arguments: the program and what it is told.
        left: where it leaves its figures.
    """

    name: str
    arguments: Sequence[object]
    left: Path


def measurements(folder: Path, corpus: Corpus, *, quick: bool) -> Iterator[Measurement]:
    """All of `NAMES`.

    Args:
        folder: of the runs.
    """
    work, on_books = folder / "measured", folder / ON_BOOKS
    trunk, small = (on_books, ["--small"]) if quick else (TRUNK, [])
    copies = write_copies(corpus)
    for name in ("decode", "serve"):
        left = work / f"{name}.json"
        yield Measurement(name, [f"bench_{name}.py", "--checkpoint", trunk, "--output", left, *small], left)
    sequences = ("--sequences", 2 if quick else 128)
    left = work / "measures.json"
    yield Measurement("measures", ["compare_measures.py", trunk, *sequences, "--output", left], left)
    for name, model, told in (("sled_code", trunk, ()), ("sled_books", on_books, corpus.overrides)):
        arguments = ["sweep.py", "sled", "--checkpoint", model, *sequences, "--output", work / name, *IN_FP32, *told]
        yield Measurement(name, arguments, work / name / "sled.json")
    for name, model, told in (("corrections_code", trunk, ()), ("corrections_books", on_books, corpus.overrides)):
        modes = ("--modes", "full,sled,dola", "--validation", "--text", copies, *sequences)
        arguments = ["evaluate.py", model, *modes, "--output", work / name, *IN_FP32, *told]
        yield Measurement(name, arguments, work / name / "evaluation.json")


IN_FP32 = ("training.precision=fp32",)
"""Whatever it was trained in."""


def make(measurement: Measurement, output: Path, log: Path) -> None:
    """Run one, unless its figures are there, and copy them to the others.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    kept = output / f"{measurement.name}.json"
    if not kept.exists():
        measurement.left.parent.mkdir(parents=True, exist_ok=True)
        _run(measurement.arguments, log)
        write_json(kept, json.loads(measurement.left.read_text()))
        print(kept, flush=True)


def train_trunk(log: Path) -> None:
    """The model of `make bench-checkpoint`, which ends at once where it is trained.

    Raises:
        UserError: it failed, or was stopped.
    """
    _run(["bench_checkpoint.py"], log)


def _run(arguments: Sequence[object], log: Path) -> None:
    program, *told = map(str, arguments)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        command = [sys.executable, str(ROOT / "tools" / program), *told]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise UserError(f"{program}: status {status}\n{end}\nall of it: {log}")


def write_copies(corpus: Corpus) -> Path:
    """A text of which a model can say half without knowing any: each line is said twice. The words are the prompts'."""
    path = corpus.prefix.with_name("copies.txt")
    if not path.exists():
        generator = random.Random(0)
        words = " ".join(json.loads(line)["prompt"] for line in corpus.prompts.read_text().splitlines()).split()
        lines = [" ".join(generator.choices(words, k=12)) for _ in range(NUM_COPIES)]
        path.write_text("".join(f"{line}\n{line}\n" for line in lines))
    return path
