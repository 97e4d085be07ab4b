"""Small Hugging Face tokenizers, trained in a moment."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no role ' ~ message.role) }}{% endif %}{% endfor %}"
)


def write_chat_tokenizer(folder: Path, chat_template: str | None = CHATML, **settings: object) -> Path:
    """The BPE with the special tokens of ChatML and of Llama, in a folder that says how it writes conversations."""
    definition = _with_special_tokens(json.loads(train_bpe(TEXTS, 320)), ("<|im_start|>", "<|im_end|>", "<s>", "</s>"))
    template = {} if chat_template is None else {"chat_template": chat_template}
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return _write_folder(folder, definition, {**names, **template, **settings})


def write_llama3_tokenizer(folder: Path, *, before: str | None = "<|begin_of_text|>", **settings: object) -> Path:
    """Like Llama 3's: byte-level BPE, and a post-processor that writes a token before every text."""
    definition = _with_special_tokens(json.loads(train_bpe(TEXTS, 320)), ("<|begin_of_text|>", "<|end_of_text|>"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    written = [] if before is None else [_writes_before(before, _id_of(definition, before))]
    definition["post_processor"] = {"type": "Sequence", "processors": [byte_level, *written]}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return _write_folder(folder, definition, {**names, "tokenizer_class": "PreTrainedTokenizerFast", **settings})


def write_llama2_tokenizer(folder: Path, **settings: object) -> Path:
    """Like Llama 2's: a mark for each blank, bytes for what has no token, and <s> before every text."""
    characters = sorted({char for text in TEXTS for char in text if char.isascii() and char != " "})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    pairs = [("▁", "e"), ("l", "e"), ("e", "r"), ("▁", "t"), ("t", "o"), ("a", "r")]
    vocabulary = {name: number for number, name in enumerate([*names, *("".join(pair) for pair in pairs)])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in pairs], "byte_fallback": True}
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    definition = {
        "version": "1.0",
        "added_tokens": [_special(name, vocabulary[name]) for name in names[:3]],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, mark]},
        "pre_tokenizer": None,
        "post_processor": _writes_before("<s>", vocabulary["<s>"]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {**model, "unk_token": "<unk>", "fuse_unk": True},
    }
    of_bos = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return _write_folder(folder, definition, {**of_bos, "tokenizer_class": "LlamaTokenizer", **settings})


def _write_folder(folder: Path, definition: object, settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _with_special_tokens(definition: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    first = len(definition["model"]["vocab"])
    definition["added_tokens"] += [_special(name, first + number) for number, name in enumerate(names)]
    return definition


def _special(name: str, number: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {**flags, "id": number, "content": name, "special": True}


def _id_of(definition: dict[str, Any], name: str) -> int:
    (number,) = [token["id"] for token in definition["added_tokens"] if token["content"] == name]
    return int(number)


def _writes_before(name: str, number: int) -> dict[str, object]:
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
