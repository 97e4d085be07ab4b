"""Conversations about the built-in corpus, to fine-tune on: make_conversations.py FOLDER [--count N]

The functions of Python's standard library that have a docstring: the user shows a signature and what it says, the
assistant answers with the body. Writes FOLDER/train.jsonl, and a twentieth of them as FOLDER/valid.jsonl.
"""

import argparse
import ast
import json
import sys
import textwrap
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_ee.data.aside import written_aside
from megatron_ee.data.corpus import documents

QUESTION = "Complete this function:\n\n"
VALIDATION_EVERY = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, help="how many at most (default: all)")
    parser.add_argument("--max-bytes", type=int, default=700, help="of a question and its answer (default: 700)")
    arguments = parser.parse_args()
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in islice(conversations(arguments.max_bytes), arguments.count)
    ]
    valid = lines[::VALIDATION_EVERY]
    train = [line for number, line in enumerate(lines) if number % VALIDATION_EVERY]
    try:
        for name, part in (("train.jsonl", train), ("valid.jsonl", valid)):
            path = arguments.folder / name
            with written_aside(path) as aside:
                aside.write_text("".join(f"{line}\n" for line in part))
                aside.replace(path)
            print(f"{path}: {len(part):,} conversations")
    except OSError as error:
        print(f"{arguments.folder}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def conversations(max_bytes: int) -> Iterator[tuple[str, str]]:
    """Questions and answers of the whole library, in the corpus's order; the same pair never twice."""
    seen: set[tuple[str, str]] = set()
    for text in documents():
        for signature, body in functions(text):
            pair = (QUESTION + signature, body)
            if pair not in seen and sum(len(part.encode()) for part in pair) <= max_bytes:
                seen.add(pair)
                yield pair


def functions(text: str) -> Iterator[tuple[str, str]]:
    """Signature with docstring, and body, of each function of a source file that has both."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in the library's own strings
            tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            end_of_docstring = node.body[0].end_lineno or 0
            if node.body[1].lineno > end_of_docstring:
                signature = "\n".join(lines[node.lineno - 1 : end_of_docstring])
                body = "\n".join(lines[end_of_docstring : node.end_lineno])
                if body.strip():
                    yield textwrap.dedent(signature), textwrap.dedent(body).strip("\n")


if __name__ == "__main__":
    sys.exit(main())
