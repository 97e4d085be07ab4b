"""Prompts of unlike kinds, with short and long answers, that come one after the other: a load for real engines.

Code and prose are of documents that training on the built-in corpus leaves for tests. Another Python has other ones.
"""

import ast
import inspect
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_ee.data.corpus import documents
from megatron_ee.errors import FieldError
from megatron_ee.inference.scheduling.workload import Lengths

Kind = Literal["code", "prose", "numbers", "bytes"]
KINDS: tuple[Kind, ...] = get_args(Kind)

HELD_OUT = 0.04
"""The share of the corpus's last documents: fewer than training leaves for tests."""
CHARACTERS, SHORT, LONG = Lengths(120, most=600), Lengths(16, most=64), Lengths(96, most=256)
_LONG_ENOUGH = 200
"""Characters of a docstring that is prose."""


@dataclass(frozen=True, slots=True)
class MixedPrompt:
    """
    Attributes:
        new_tokens: of its answer.
        arrival: when it comes, in seconds.
    """

    kind: Kind
    prompt: str
    new_tokens: int
    arrival: float = 0.0


def mixed_prompts(
    count: int,
    seed: int,
    *,
    times: Sequence[float] = (),
    characters: Lengths = CHARACTERS,
    short: Lengths = SHORT,
    long: Lengths = LONG,
) -> list[MixedPrompt]:
    """So many, as many of each kind, and as many with short as with long answers.

    Args:
        times: when they come, as `arrivals` gives them; none: all at once.
        characters: of prompts.
        short, long: the answers, in tokens.
    """
    numbers = random.Random(seed)
    texts = _Texts()
    drawn = [(KINDS[number % len(KINDS)], (short, long)[number // len(KINDS) % 2]) for number in range(count)]
    numbers.shuffle(drawn)
    return [
        MixedPrompt(kind, texts.draw(kind, characters.draw(numbers), numbers), answers.draw(numbers), arrival)
        for (kind, answers), arrival in zip(drawn, times or (0.0,) * count, strict=True)
    ]


def write_mixed_prompts(path: Path, prompts: Sequence[MixedPrompt]) -> None:
    """A line of JSON for each; the inference command reads it too."""
    path.write_text("".join(json.dumps(asdict(of)) + "\n" for of in prompts), encoding="utf-8")


def read_mixed_prompts(path: Path) -> list[MixedPrompt]:
    """
    Raises:
        FieldError: a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FieldError(str(path), f"cannot be read: {error}") from error
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, where: str) -> MixedPrompt:
    try:
        fields: dict[str, Any] = json.loads(line)
        kind, prompt = fields["kind"], fields["prompt"]
        new_tokens, arrival = int(fields["new_tokens"]), float(fields["arrival"])
    except (ValueError, KeyError, TypeError) as error:
        raise FieldError(where, f"is no prompt of a mixed load: {error!r}") from error
    if kind not in KINDS or not isinstance(prompt, str) or not prompt or new_tokens < 1:
        raise FieldError(where, f"needs a kind of {', '.join(KINDS)}, a text, and one new token at least")
    return MixedPrompt(kind, prompt, new_tokens, arrival)


class _Texts:
    def __init__(self) -> None:
        self._code = list(documents(last=HELD_OUT))
        self._prose = [text for document in self._code for text in _docstrings(document)]

    def draw(self, kind: Kind, size: int, numbers: random.Random) -> str:
        """A text of so many characters, or of all that a document or a docstring has."""
        match kind:
            case "code":
                text = numbers.choice(self._code)
                start = text.rfind("\n", 0, numbers.randrange(len(text))) + 1
            case "prose":
                text, start = numbers.choice(self._prose), 0
            case "numbers":
                text, start = "".join(_sums(size, numbers)), 0
            case "bytes":
                text, start = numbers.randbytes(size).decode("latin-1"), 0
        return text[start : start + size]


def _docstrings(document: str) -> Iterator[str]:
    try:
        nodes = list(ast.walk(ast.parse(document)))
    except (SyntaxError, ValueError):  # a file for another Python, or with null bytes
        return
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) >= _LONG_ENOUGH:
                yield text


def _sums(size: int, numbers: random.Random) -> Iterator[str]:
    """Lines of sums, of `size` characters or more."""
    length = 0
    while length < size:
        one, other = numbers.randrange(1000), numbers.randrange(1000)
        line = f"{one} + {other} = {one + other}\n"
        length += len(line)
        yield line
