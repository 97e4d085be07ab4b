"""Hugging Face tokenizers: a tokenizer.json, a tokenizer's folder, or a byte-level BPE trained here."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ee.errors import UserError
from megatron_ee.tokenizer.special import SpecialToken

NO_PAD = -1  # megatron-core masks labels that equal the pad id, so it must be no token where there is none to mask

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_ANCHOR = "\U0010fff0"  # a private character; a text that has it is encoded as if nothing were before it

# Names of the end-of-document token, for a tokenizer whose settings don't say.
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# A byte-level regex never lets one word reach over a letter followed by a blank, so a long text may be cut there.
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?=[ \n])")


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library; see `megatron_ee.tokenizer.Tokenizer`.

    Special tokens that are spelled out in a text are text: no document can end another's.
    """

    def __init__(self, files: Mapping[str, bytes], *, where: str, piece_size: int = 1 << 16) -> None:
        """
        Args:
            files: contents of tokenizer.json and of what there is of SETTINGS_FILES and CHAT_TEMPLATE_FILE.
            where: the tokenizer's path, for messages.
            piece_size: long texts are cut near every so many characters, where that changes nothing.

        Raises:
            UserError: a file is damaged, or there is no end-of-document token.
        """
        self._files, self._piece_size = files, piece_size
        try:
            self._library = _import_tokenizers(where).Tokenizer.from_buffer(files[TOKENIZER_FILE])
            settings = _read_settings(files)
            self.chat_template = _read_chat_template(files)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{where}: not a tokenizer ({' '.join(str(error).split())})") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        vocabulary: dict[str, int] = self._library.get_vocab()
        eod_name = _end_of_document(vocabulary, settings, where)
        self.eod = vocabulary[eod_name]
        pad = vocabulary.get(settings.get("pad_token", ""), NO_PAD)
        self.pad = NO_PAD if pad == self.eod else pad
        self.vocab_size = max(vocabulary.values()) + 1
        self.begin = _begin(self._library, self.vocab_size, where)
        self.name = f"hf-{hashlib.sha256(files[TOKENIZER_FILE] + eod_name.encode()).hexdigest()[:16]}"
        definition = json.loads(files[TOKENIZER_FILE])
        self._can_cut = _can_cut(definition)
        self.named_tokens: Mapping[str, str] = {"eos_token": eod_name} | {
            role: name for role, name in settings.items() if name in vocabulary
        }
        named = {name: SpecialToken(vocabulary[name]) for name in self.named_tokens.values()}
        self.special_tokens: Mapping[str, SpecialToken] = named | _special_tokens(definition)
        # decoders treat the first token of a text in their own ways, so ours always come after this one
        self._before = self.encode("a")
        self._text_before = self._library.decode(self._before)

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with nothing added before or after."""
        tokens: list[int] = []
        for piece in self.pieces(text):
            # of a batch of one: the library has no other call that leaves out positions and strings
            tokens += self._library.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        return tokens

    def encode_within(self, text: str) -> list[int]:
        """The tokens of a text that comes after others: here after one that nothing joins."""
        if _ANCHOR in text:
            return self.encode(text)
        ids: list[int] = self._anchored.encode_batch_fast([_ANCHOR + text], add_special_tokens=False)[0].ids
        return ids[1:]

    @cached_property
    def _anchored(self) -> Any:
        """The tokenizer with one more token, which it splits a text at as it does at special tokens."""
        library = _import_tokenizers("")
        anchored = library.Tokenizer.from_buffer(self._files[TOKENIZER_FILE])
        anchored.no_truncation()
        anchored.no_padding()
        anchored.encode_special_tokens = True
        anchored.add_tokens([library.AddedToken(_ANCHOR, normalized=False, special=False)])
        return anchored

    def pieces(self, text: str) -> Iterator[str]:
        """Cut between words where the tokenizer never looks over a word's end; else the text as it is."""
        return _pieces(text, self._piece_size) if self._can_cut else iter([text])

    def decode(self, tokens: list[int]) -> str:
        """The text that these tokens add to the text before them; special tokens add none."""
        text: str = self._library.decode([*self._before, *tokens])
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        return str(self._library.decode(tokens))

    def files(self) -> Mapping[str, bytes]:
        return self._files


def open_huggingface(path: Path) -> HuggingFaceTokenizer:
    """A tokenizer from its file or its folder. Only in a folder do settings name its special tokens.

    Raises:
        UserError: see `HuggingFaceTokenizer`; or nothing in the folder is a tokenizer.
    """
    where = str(path)
    try:
        if path.is_file():
            return HuggingFaceTokenizer({TOKENIZER_FILE: path.read_bytes()}, where=where)
        names = (TOKENIZER_FILE, *SETTINGS_FILES, CHAT_TEMPLATE_FILE)
        files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    return HuggingFaceTokenizer(files if TOKENIZER_FILE in files else _convert(path, where), where=where)


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE, which can spell any text; returns its tokenizer.json.

    Args:
        vocab_size: tokens at most (a small text yields fewer), with the 256 bytes and `<|endoftext|>`, which is 0.

    Raises:
        UserError: `vocab_size` leaves no room for the bytes.
    """
    library = _import_tokenizers("--train-bpe")
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"--train-bpe: {vocab_size} must be above {len(alphabet)}: every byte is a token")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END_OF_DOCUMENT[0]], initial_alphabet=alphabet, show_progress=False
    )
    # in short pieces, which the library counts several times faster
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text, 1 << 12)), trainer)
    return str(tokenizer.to_str()).encode()


def _pieces(text: str, size: int) -> Iterator[str]:
    start = 0
    while cut := _BETWEEN_WORDS.search(text, start + size):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _can_cut(definition: Mapping[str, Any]) -> bool:
    """Whether the tokenizer splits words as GPT-2 does and does nothing else to a text."""
    splitter = definition.get("pre_tokenizer") or {}
    by_words = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    has_own_words = any(not token.get("special") for token in definition.get("added_tokens", ()))
    return by_words and not (splitter.get("add_prefix_space", True) or definition.get("normalizer") or has_own_words)


def _special_tokens(definition: Mapping[str, Any]) -> dict[str, SpecialToken]:
    return {
        token["content"]: SpecialToken(token["id"], token.get("lstrip", False), token.get("rstrip", False))
        for token in definition.get("added_tokens", ())
        if token.get("special")
    }


def _read_settings(files: Mapping[str, bytes]) -> dict[str, str]:
    """Role -> name of the special tokens that the settings files name; the first file that names a role wins."""
    settings: dict[str, str] = {}
    for name in SETTINGS_FILES:
        for role, token in json.loads(files.get(name, b"{}")).items():
            spelled = token.get("content") if isinstance(token, dict) else token
            if role in _ROLES and isinstance(spelled, str):
                settings.setdefault(role, spelled)
    return settings


def _read_chat_template(files: Mapping[str, bytes]) -> str | None:
    """From its own file, or from the settings; of several with names there, the one that is called default."""
    if CHAT_TEMPLATE_FILE in files:
        return files[CHAT_TEMPLATE_FILE].decode()
    template = json.loads(files.get(SETTINGS_FILES[0], b"{}")).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _begin(library: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """What the tokenizer's post-processor writes before a text: in transformers, too, it alone says, where there is a
    tokenizer.json, and not the settings' add_bos_token."""
    written = library.encode("a", add_special_tokens=True)
    marks = zip(written.ids, written.special_tokens_mask, strict=True)
    begin = tuple(token for token, _ in takewhile(lambda mark: mark[1], marks))
    for token in begin:
        if token >= vocab_size:
            raise UserError(f"{where}: its post-processor writes token {token}, which is none of it")
    return begin


def _end_of_document(vocabulary: Mapping[str, int], settings: Mapping[str, str], where: str) -> str:
    named = settings.get("eos_token")
    if named is not None and named not in vocabulary:
        raise UserError(f"{where}: its settings name {named!r} as eos_token, which is no token of it")
    for name in (named, *_END_OF_DOCUMENT):
        if name in vocabulary:
            return str(name)
    raise UserError(
        f"{where}: no end-of-document token: neither an eos_token in {SETTINGS_FILES[0]} beside it (name the folder) "
        f"nor one of {', '.join(_END_OF_DOCUMENT)}"
    )


def _convert(folder: Path, where: str) -> dict[str, bytes]:
    """The files of a folder without tokenizer.json, made by transformers; nothing is downloaded, no code is run."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"{where}: holds no {TOKENIZER_FILE}, and to make one {_INSTALL}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where}: holds no {TOKENIZER_FILE}, and transformers finds no tokenizer: {reason}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        raise UserError(f"{where}: {kind} has no form as a {TOKENIZER_FILE}, which is what can be used here")
    settings = {name: getattr(tokenizer, name, None) for name in (*_ROLES, "chat_template")}
    return {
        TOKENIZER_FILE: tokenizer.backend_tokenizer.to_str().encode(),
        SETTINGS_FILES[0]: json.dumps({name: value for name, value in settings.items() if value}).encode(),
    }


def _import_tokenizers(where: str) -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{where}: {_INSTALL}") from error
    return tokenizers


_INSTALL = "needs Hugging Face's libraries: pip install 'megatron-ee[hf]'"
