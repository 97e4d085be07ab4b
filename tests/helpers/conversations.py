"""Small files of conversations."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from helpers.runs import WORDS, run_config
from megatron_ee.config import Config

Talk = list[dict[str, str]]


def talk(*contents: str) -> Talk:
    """The user and the assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def write_talks(path: Path, talks: list[Talk]) -> Path:
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in talks).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def small_talks(count: int = 60) -> list[Talk]:
    """One to three short questions and answers each."""
    generator = np.random.default_rng(0)

    def words() -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(1, 4)))

    return [talk(*(words() for _ in range(2 * int(generator.integers(1, 4))))) for _ in range(count)]


def chat_config(folder: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> Config:
    """A tiny model's run on talks.jsonl in `folder`."""
    own = {"format": "messages", "dataset": str(folder / "talks.jsonl"), "sequence_length": 160}
    return run_config(folder, data={**own, **(data or {})}, **changes)
