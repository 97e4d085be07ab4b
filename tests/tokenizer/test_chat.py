"""Chat templates: which tokens they write, which of them are learned, and that no message writes special tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import BLOCKS, CHATML, LLAMA, write_bpe, write_chat_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ee.errors import FieldError
from megatron_ee.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from megatron_ee.tokenizer.chat import ChatTemplate, ChatTokens, open_chat_template
from megatron_ee.tokenizer.messages import ChatError, Message, parse_messages

TALK = [
    Message("user", "a token\n"),
    Message("assistant", "early exits"),
    Message("user", "deeper?"),
    Message("assistant", " let a token leave "),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(write_chat_tokenizer(tmp_path_factory.mktemp("chat"))))


def _spelled(template: ChatTemplate, tokenizer: Tokenizer, chat: ChatTokens) -> str:
    """Special tokens by name, what is learned in brackets, token by token."""
    names = {token.id: f"{{{name}}}" for name, token in tokenizer.special_tokens.items()}
    text, was = "", False
    for token, learned in zip(*chat, strict=True):
        text += ("«" if learned else "»") if learned != was else ""
        text += names.get(token) or tokenizer.decode([token])
        was = learned
    return text + ("»" if was else "")


EXPECTED = {
    "ChatML": (
        CHATML,
        "{<|im_start|>}user\na token{<|im_end|>}\n{<|im_start|>}assistant\n«early exits{<|im_end|>}»\n"
        "{<|im_start|>}user\ndeeper?{<|im_end|>}\n{<|im_start|>}assistant\n«let a token leave{<|im_end|>}»\n",
    ),
    "blocks": (
        BLOCKS,
        "{<|im_start|>}user\na token\n{<|im_end|>}\n{<|im_start|>}assistant\n«early exits{<|im_end|>}»\n"
        "{<|im_start|>}user\ndeeper?{<|im_end|>}\n{<|im_start|>}assistant\n« let a token leave {<|im_end|>}»\n",
    ),
    "blocks that leave out the end": (
        BLOCKS.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
        "{<|im_start|>}user\na token\n{<|im_end|>}\n{<|im_start|>}assistant\n«early exits{<|im_end|>}»\n"
        "{<|im_start|>}user\ndeeper?{<|im_end|>}\n{<|im_start|>}assistant\n« let a token leave {<|im_end|>}»\n",
    ),
    "Llama": (
        LLAMA,
        "{<s>}[INST] a token\n [/INST]« early exits {</s>}»[INST] deeper? [/INST]«  let a token leave  {</s>}»",
    ),
    "no special token ends an answer": (
        "{% for message in messages %}{{ message.role }}> {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant> {% endif %}",
        "user> a token\n\nassistant> «early exits\n»user> deeper?\nassistant> « let a token leave \n»",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_answers_and_their_ends_are_learned_token_by_token(name: str, tokenizer: Tokenizer) -> None:
    source, expected = EXPECTED[name]
    template = ChatTemplate(source, tokenizer)
    assert _spelled(template, tokenizer, template.encode(TALK)) == expected


def test_the_byte_tokenizer_has_a_template() -> None:
    tokenizer = ByteTokenizer()
    template = open_chat_template("default", tokenizer)
    assert _spelled(template, tokenizer, template.encode(TALK[:2])) == (
        "user:\na token\n{<|endoftext|>}assistant:\n«early exits{<|endoftext|>}»"
    )
    assert template.render(TALK[:1], add_generation_prompt=True) == "user:\na token\n<|endoftext|>assistant:\n"


TEMPLATES = {"ChatML": CHATML, "blocks": BLOCKS, "Llama": LLAMA}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_training_has_before_the_answer(name: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES[name], tokenizer)
    whole = template.encode(TALK)
    for number in (1, 3):
        prompt = template.prompt(TALK[:number])
        assert whole.tokens[: len(prompt)] == prompt
        assert whole.learned[len(prompt)] and not whole.learned[len(prompt) - 1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_mask_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_chat_tokenizer(tmp_path, TEMPLATES[name])
    theirs, tokenizer = AutoTokenizer.from_pretrained(folder), open_tokenizer(str(folder))
    template = open_chat_template("default", tokenizer)
    tree = [message._asdict() for message in TALK]
    for prompt in (False, True):
        text = theirs.apply_chat_template(tree, tokenize=False, add_generation_prompt=prompt)
        assert template.render(TALK, add_generation_prompt=prompt) == text
    if name == "blocks":
        expected = theirs.apply_chat_template(tree, return_dict=True, return_assistant_tokens_mask=True)
        chat = template.encode(TALK)
        assert chat.tokens == expected["input_ids"]
        assert chat.learned == [bool(value) for value in expected["assistant_masks"]]


EVIL = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "|im_start|>", "</s>", "s>", "</", " ", "\n", "a", "é"])
    | st.characters(exclude_categories=["Cs"])
    | st.sampled_from(["\U0010fffd", "\U0010fffc", "\U0010fffb", "\U0010fff0"]),
    max_size=8,
).map("".join)


@example("a<|im_", "end|>")
@example("|im_", "end|")
@example("", "|im_end|")
@example("a", "</s")
@example("/s>", "")
@given(EVIL, EVIL)
def test_no_message_writes_a_special_token(question: str, answer: str) -> None:
    """Not even where contents meet each other, or what the template writes."""
    for source in TEMPLATES.values():
        template = ChatTemplate(source, HF)
        plain = template.encode([Message("user", "x"), Message("assistant", "y")])
        hostile = [Message("user", question), Message("assistant", answer + "z")]
        assert _specials(template.encode(hostile).tokens) == _specials(plain.tokens)
        text = template.render(hostile)
        assert question.strip() in text and answer.strip() in text
    joined = ChatTemplate("{{ bos_token }}<{% for m in messages %}{{ m.content }}{% endfor %}>{{ eos_token }}", HF)
    tokens = joined.encode([Message("user", question), Message("user", answer)]).tokens
    assert _specials(tokens) == _specials(joined.encode([Message("user", "x")]).tokens)
    assert HF.decode(tokens) == f"<{question}{answer}>"


def _specials(tokens: list[int]) -> list[int]:
    special = {token.id for token in HF.special_tokens.values()}
    return [token for token in tokens if token in special]


def _make_tokenizer() -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return open_tokenizer(str(write_chat_tokenizer(Path(folder))))


HF = _make_tokenizer()


def test_a_message_that_spells_the_end_is_text_and_comes_back(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(CHATML, tokenizer)
    chat = template.encode([Message("user", "x<|im_end|>"), Message("assistant", "<|im_start|>y")])
    end = tokenizer.special_tokens["<|im_end|>"].id
    assert chat.tokens.count(end) == 2
    assert tokenizer.decode(chat.tokens) == "user\nx<|im_end|>\nassistant\n<|im_start|>y\n"


def test_blanks_beside_a_special_token_may_belong_to_it(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    next(token for token in definition["added_tokens"] if token["content"] == "<|im_end|>").update(rstrip=True)
    next(token for token in definition["added_tokens"] if token["content"] == "</s>").update(lstrip=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = open_tokenizer(str(folder))
    source = "{% for m in messages %}{{ m.content }} </s><|im_end|>\n {% endfor %}"
    template = ChatTemplate(source, tokenizer)
    library = __import__("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = library.encode(template.render(TALK[:1] * 2), add_special_tokens=False).ids
    assert template.encode(TALK[:1] * 2).tokens == expected


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_that_marks_the_first_word_marks_no_other(scheme: str, tmp_path: Path) -> None:
    """The SentencePiece kind; transformers' tokens are those of the library, of the whole text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    vocabulary = {"<unk>": 0, "▁": 1, **{letter: 2 + i for i, letter in enumerate("abc[/INST]")}, "▁a": 40, "▁b": 41}
    library = Library(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    library.decoder = decoders.Metaspace(prepend_scheme=scheme)
    library.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    template = ChatTemplate("{% for m in messages %}{{ m.content }}</s>{% endfor %}", tokenizer)
    talk = [Message("user", "a b"), Message("user", "b"), Message("user", " a")]
    assert template.encode(talk).tokens == library.encode(template.render(talk), add_special_tokens=False).ids


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path, BLOCKS)
    assert open_chat_template("default", open_tokenizer(str(folder))).source == BLOCKS
    (folder / "chat_template.jinja").write_text(LLAMA)
    tokenizer = open_tokenizer(str(folder))
    assert open_chat_template("default", tokenizer).source == LLAMA
    assert tokenizer.files()["chat_template.jinja"] == LLAMA.encode(), "a checkpoint keeps it"
    named = [{"name": "tools", "template": LLAMA}, {"name": "default", "template": CHATML}]
    several = open_tokenizer(str(write_chat_tokenizer(tmp_path / "several", named)))  # type: ignore[arg-type]
    assert several.chat_template == CHATML
    (tmp_path / "own.jinja").write_text(BLOCKS)
    assert open_chat_template(str(tmp_path / "own.jinja"), tokenizer).source == BLOCKS


def test_a_template_that_is_missing_or_broken_is_one_message(tmp_path: Path) -> None:
    bpe = open_tokenizer(str(write_bpe(tmp_path / "bpe.json")))
    with pytest.raises(
        FieldError, match=r"^data\.chat_template: the tokenizer has no chat template of its own: name a"
    ):
        open_chat_template("default", bpe)
    with pytest.raises(FieldError, match=r"^data\.chat_template: none\.jinja: cannot be read \(No such file"):
        open_chat_template("none.jinja", bpe)
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }\n")
    with pytest.raises(FieldError, match=r"bad\.jinja: line 2: unexpected '}'$"):
        open_chat_template(str(tmp_path / "bad.jinja"), bpe)


REFUSED = {
    "its own word": ("{{ raise_exception('roles must alternate') }}", "the chat template fails: roles must alternate"),
    "a fault": ("{{ messages[0].content + 1 }}", "the chat template fails: TypeError: "),
    "an escape": ("{{ messages.__class__.__mro__ }}", "the chat template fails: access to attribute '__class__'"),
    "a change": ("{% set x = messages.append(1) %}", "the chat template fails: access to attribute 'append'"),
    "answers that move": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "the chat template changes what it wrote before message 1: '1question' becomes '2questionanswer'; it needs",
    ),
    "answers that are changed": (
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "messages.1: the chat template does not write the answer as it is, behind the prompt for it",
    ),
    "blocks in blocks": (
        "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
        "the chat template has a {% generation %} block within another",
    ),
    "blocks without answers": (
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}answer",
        "the chat template writes no {% generation %} block for this conversation",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_cannot_write_says_why(name: str, tokenizer: Tokenizer) -> None:
    source, message = REFUSED[name]
    with pytest.raises(ChatError) as caught:
        ChatTemplate(source, tokenizer).encode([Message("user", "question"), Message("assistant", "answer")])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "messages: no list: it needs at least one message"),
        ([], "messages: empty: it needs at least one message"),
        (["a"], "messages.0: no object with role and content"),
        ([{"role": "usr", "content": "a"}], "messages.0.role: 'usr' must be one of system, user, assistant; did you"),
        ([{"role": None, "content": "a"}], "messages.0.role: None must be one of system, user, assistant"),
        ([{"role": "user", "content": None}], "messages.0.content: must be a text"),
        ([{"role": "user", "content": "\ud800"}], "messages.0.content: half a surrogate pair"),
        ([{"role": "assistant", "content": " \n"}], "messages.0.content: an empty answer"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages.0: key 'tool_calls' is not supported"),
    ],
)
def test_messages_that_are_none_are_named(value: Any, message: str) -> None:
    with pytest.raises(ChatError) as caught:
        parse_messages(value)
    assert str(caught.value).startswith(message)
