"""Prompts from files."""

from pathlib import Path

import pytest

from megatron_ee.errors import UserError
from megatron_ee.inference.prompts import read_prompts


def test_a_line_is_a_prompt_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffdef \r\n\n  größer\n".encode())
    assert read_prompts(path) == ["def ", "  größer"]


def test_a_jsonl_has_texts_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines", "id": 7}\n\n{"prompt": ""}\n{"prompt": [1, 2]}')
    assert read_prompts(path) == ["two\nlines", "", [1, 2]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ('"a"', 'not {"prompt": TEXT} or'),
        ('{"text": "a"}', 'not {"prompt": TEXT} or'),
        ('{"prompt": []}', 'not {"prompt": TEXT} or'),
        ('{"prompt": [1, true]}', 'not {"prompt": TEXT} or'),
        ('{"prompt": null}', 'not {"prompt": TEXT} or'),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: {reason}")


def test_a_file_without_prompts_is_named(tmp_path: Path) -> None:
    for content, message in ((b"\n \n", "no prompt in it"), (b"a\xff", "not UTF-8 at byte 1"), (None, "No such file")):
        path = tmp_path / "prompts.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_prompts(path)
