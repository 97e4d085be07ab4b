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
    definition = json.loads(train_bpe(TEXTS, 320))
    for name in ("<|im_start|>", "<|im_end|>", "<s>", "</s>"):
        token = {"id": 320 + len(definition["added_tokens"]) - 1, "content": name, "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        definition["added_tokens"].append({**flags, **token})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    template = {} if chat_template is None else {"chat_template": chat_template}
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **template, **settings}))
    return folder
