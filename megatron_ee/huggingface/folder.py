"""A model's folder of Hugging Face's, opened by its headers and read row by row: no more memory than is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from megatron_ee.config import ExitsConfig, Precision
from megatron_ee.errors import UserError
from megatron_ee.huggingface.architecture import HuggingFaceModel, model_config_of
from megatron_ee.huggingface.exit_files import EXIT_WEIGHTS_FILE, EXITS_FILE, exit_recipes, read_exits
from megatron_ee.huggingface.headers import StoredTensor, read_header, read_headers
from megatron_ee.huggingface.names import Recipe, recipes_of

PRECISIONS: Mapping[str, Precision] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""dtype as safetensors names it -> what parameters of it are."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NOT_PARAMETERS = ".rotary_emb.inv_freq"  # follows from config.json; old files have it
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Folder:
    """A model of a known architecture, all of whose tensors are there, of the right shapes and one dtype.

    Attributes:
        described: what its config.json says.
        exits: what lies beside it in exits.json; none where there is no such file.
        tensors: theirs, and the exits' own, by name, unread.
        recipes: how each of our parameters is made of them, by our name.
        precision: what the tensors are of, whatever config.json says.
    """

    path: Path
    described: HuggingFaceModel
    exits: ExitsConfig
    tensors: Mapping[str, StoredTensor]
    recipes: Mapping[str, Recipe]
    precision: Precision

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One of their tensors, or some rows of it, in new memory.

        Raises:
            UserError: the file cannot be read, or is not what it was.
        """
        return read_tensor(self.tensors[name], name, rows)

    def read_parameter(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One of our parameters, or some rows of it, in new memory; see `read`."""
        recipe = self.recipes[name]
        start, stop, _ = (rows or slice(None)).indices(recipe.shape[0])
        dtype = _DTYPES[self.tensors[next(iter(recipe.tensors))].dtype]
        parameter = torch.empty((max(0, stop - start), *recipe.shape[1:]), dtype=dtype)
        for piece in recipe.rows(start, stop):
            part = parameter[piece.at : piece.at + piece.stop - piece.start]
            _fill(part, self.tensors[piece.tensor], piece.tensor, piece.start)
        return parameter


def open_folder(path: Path) -> Folder:
    """Open a folder that transformers could load; only headers are read.

    Raises:
        UserError: its architecture is not known; it holds pickles alone; a file is missing, cut off or damaged; a
            tensor is missing, of a wrong shape, of another dtype than the others, or of no use.
    """
    described = model_config_of(path)
    tensors = {name: of for name, of in read_headers(path).items() if not name.endswith(_NOT_PARAMETERS)}
    recipes = recipes_of(described.model)
    _check_tensors(path, tensors, recipes)
    if described.model.tie_embeddings and _HEAD in tensors:
        _check_tied(tensors)
        del tensors[_HEAD]
    _refuse_unknown(tensors, recipes, f"a {described.architecture}")
    exits = read_exits(path, described.model)
    if of_exits := exit_recipes(described.model, exits):
        stored = read_header(path / EXIT_WEIGHTS_FILE)
        _check_tensors(path / EXIT_WEIGHTS_FILE, stored, of_exits)
        _refuse_unknown(stored, of_exits, EXITS_FILE)
        tensors, recipes = tensors | stored, recipes | of_exits
    precision = _precision(tensors)
    return Folder(path, described, exits, MappingProxyType(tensors), MappingProxyType(recipes), precision)


def read_tensor(stored: StoredTensor, name: str, rows: slice | None = None) -> torch.Tensor:
    """A tensor of a file, or some rows of it, in new memory.

    Raises:
        UserError: the file cannot be read, or is not what it was.
    """
    start, stop, step = (rows or slice(None)).indices(stored.shape[0])
    assert step == 1, "rows are read one after another"
    tensor = torch.empty((max(0, stop - start), *stored.shape[1:]), dtype=_DTYPES[stored.dtype])
    _fill(tensor, stored, name, start)
    return tensor


def _fill(tensor: torch.Tensor, stored: StoredTensor, name: str, row: int) -> None:
    """Read as many rows as a tensor has, in one piece, from `row` on."""
    left = tensor.view(-1).view(torch.uint8).numpy().data
    row_bytes = stored.num_bytes // stored.shape[0]
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start + row * row_bytes)
            while left:
                num_bytes = file.readinto(left)
                if not num_bytes:
                    raise UserError(f"{stored.file}: ends within {name}")
                left = left[num_bytes:]
    except OSError as error:
        raise UserError(f"{stored.file}: {name} cannot be read: {error.strerror}") from error


def _check_tensors(path: Path, tensors: Mapping[str, StoredTensor], recipes: Mapping[str, Recipe]) -> None:
    for name, shape in _expected(recipes).items():
        if name not in tensors:
            raise UserError(f"{path}: the tensor {name} is missing")
        if tensors[name].shape != shape:
            raise UserError(f"{tensors[name].file}: {name} is {list(tensors[name].shape)}, not {list(shape)}")


def _refuse_unknown(tensors: Mapping[str, StoredTensor], recipes: Mapping[str, Recipe], what: str) -> None:
    if unknown := sorted(tensors.keys() - _expected(recipes).keys()):
        raise UserError(f"{tensors[unknown[0]].file}: {unknown[0]}: {what} has no such tensor")


def _expected(recipes: Mapping[str, Recipe]) -> dict[str, tuple[int, ...]]:
    return {name: shape for recipe in recipes.values() for name, shape in recipe.tensors.items()}


def _check_tied(tensors: Mapping[str, StoredTensor]) -> None:
    """A tied output that is stored once more has to be the embedding."""
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and head.dtype in _DTYPES
    for start in range(0, head.shape[0] if same else 0, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        ours, theirs = read_tensor(head, _HEAD, rows), read_tensor(embedding, _EMBEDDING, rows)
        same = same and torch.equal(ours.view(torch.int8), theirs.view(torch.int8))
    if not same:
        raise UserError(f"{head.file}: {_HEAD} is not {_EMBEDDING}, though tie_word_embeddings says so")


def _precision(tensors: Mapping[str, StoredTensor]) -> Precision:
    first, of_first = next(iter(tensors.items()))
    for name, stored in tensors.items():
        if stored.dtype not in PRECISIONS:
            raise UserError(f"{stored.file}: {name} is {stored.dtype}; only {', '.join(PRECISIONS)} can be read")
        if stored.dtype != of_first.dtype:
            raise UserError(
                f"{stored.file}: {name} is {stored.dtype} and {first} is {of_first.dtype}: all have to be of one dtype"
            )
    return PRECISIONS[of_first.dtype]
