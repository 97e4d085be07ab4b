"""Prompts from files. Imports no torch."""

import json
from pathlib import Path

from megatron_ee.errors import UserError

Prompt = str | list[int]


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line that is not blank. In a .jsonl, a line is an object whose `prompt` is a text or a list of token
    ids; what else it has is not looked at.

    Raises:
        UserError: the file cannot be read, has no prompt, or a line of a .jsonl is none.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: no prompt in it")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_parse(line, f"{path}:{number}") for number, line in numbered]


def _parse(line: str, where: str) -> Prompt:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    prompt = content.get("prompt") if isinstance(content, dict) else None
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise UserError(f'{where}: not {{"prompt": TEXT}} or {{"prompt": [TOKEN, ...]}}')
