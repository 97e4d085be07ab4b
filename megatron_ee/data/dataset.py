"""Training and validation sequences through megatron-core's GPTDataset."""

from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_ee.config import Config, DataConfig
from megatron_ee.data.corpus import corpus_prefix, write_corpus
from megatron_ee.data.indexed import bin_path, index_path
from megatron_ee.errors import UserError
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.tokenizer import Tokenizer

BUILT_IN = "python-stdlib"


class DatasetError(UserError):
    """The dataset that the config names cannot be read, or is too small for what is asked of it."""


@dataclass(frozen=True, slots=True)
class Datasets:
    """The splits of a run, each with as many samples as it asks for; `valid` is None where it asks for none."""

    train: GPTDataset
    valid: GPTDataset | None


def open_datasets(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> Datasets:
    """Build the run's datasets; the first rank writes what has to be written, the others wait for it.

    Raises:
        DatasetError: no .bin/.idx pair at `data.dataset`, or a split without documents for its samples.
    """
    data, training = config.data, config.training
    prefix = dataset_prefix(data)
    if data.dataset == BUILT_IN:
        if mesh.is_main:
            write_corpus(prefix, tokenizer)
        mesh.barrier()
    for path in (bin_path(prefix), index_path(prefix)):
        if not path.exists():
            raise DatasetError(f"data.dataset: {path} does not exist ({BUILT_IN} is built in)")
    num_valid = training.eval_iters * training.global_batch_size
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset,
        [training.train_iters * training.global_batch_size, num_valid, 0],
        lambda: True,
        GPTDatasetConfig(
            random_seed=config.seed,
            sequence_length=data.sequence_length,
            blend=([str(prefix)], None),
            split=",".join(str(share) for share in data.split),
            path_to_cache=str(Path(data.folder) / "cache"),
            tokenizer=_IdentifiedTokenizer(tokenizer, data.tokenizer),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        ),
    ).build()
    if train is None or (num_valid and valid is None):
        raise DatasetError(f"data.split: no documents left for {'training' if train is None else 'validation'}")
    return Datasets(train, valid if num_valid else None)


def dataset_prefix(data: DataConfig) -> Path:
    """The path prefix of the .bin and .idx that a config names."""
    return corpus_prefix(Path(data.folder), data.tokenizer) if data.dataset == BUILT_IN else Path(data.dataset)


class _IdentifiedTokenizer:
    """What megatron-core's dataset asks of a tokenizer; the identifiers name the index cache."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.eod, self.pad, self.vocab_size = tokenizer.eod, tokenizer.pad, tokenizer.vocab_size
        self.unique_identifiers = {"class": "megatron_ee", "name": name}
