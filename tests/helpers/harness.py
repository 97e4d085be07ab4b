"""Small tasks of lm-evaluation-harness, as files: choices, likelihoods of texts, and answers."""

import json
from collections.abc import Sequence
from pathlib import Path

_CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_TEXTS = """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
_ANSWERS = """\
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["zz"], max_gen_toks: 8, do_sample: false, temperature: 0}}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match}}]
"""
_SENTENCE = "the model reads a text and says what comes next while every layer has its own idea of it"
_WORDS = _SENTENCE.split(" ")
COUNT = 24


def texts_of_tasks() -> list[str]:
    """The texts that are scored, and whose continuations are asked for."""
    return [" ".join(_words(number) * 3) for number in range(COUNT)]


def write_tasks(folder: Path, answers: Sequence[str] = ("the",) * COUNT) -> Path:
    """A folder for the harness to include.

    Args:
        answers: that are right after each of the texts.
    """
    rows = {
        "choices": [
            {"question": " ".join(_words(number)), "choices": _WORDS[number % 9 :][:4], "answer": number % 4}
            for number in range(COUNT)
        ],
        "texts": [{"text": text, "answer": answer} for text, answer in zip(texts_of_tasks(), answers, strict=True)],
    }
    for name, of in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    for name, text in (("choices", _CHOICES), ("texts", _TEXTS), ("answers", _ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def _words(number: int) -> list[str]:
    return [_WORDS[(number * step) % len(_WORDS)] for step in range(1, 9)]
