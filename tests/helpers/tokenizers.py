"""Small Hugging Face tokenizers, trained in a moment."""

import json
from pathlib import Path

from megatron_ee.tokenizer import train_bpe

TEXTS = (
    "early exits let a token leave when it is settled, while deeper layers catch up. " * 40,
    "größer, 12 кота! " * 20,
)


def write_bpe(path: Path, vocab_size: int = 320) -> Path:
    """A byte-level BPE as a tokenizer.json at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(train_bpe(TEXTS, vocab_size))
    return path


def write_bpe_folder(folder: Path, **special_tokens: object) -> Path:
    """The same as a Hugging Face folder; `special_tokens` are its settings: eos_token="<|endoftext|>"."""
    write_bpe(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(special_tokens))
    return folder
