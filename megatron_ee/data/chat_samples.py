"""Training and validation sequences of conversations (supervised fine-tuning)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_ee.config import Config, DataConfig
from megatron_ee.data.conversations import Conversations, keep_conversations, map_conversations
from megatron_ee.data.packing import Packing, one_each, pack, random_order
from megatron_ee.errors import FieldError
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.tokenizer import NO_PAD, Tokenizer
from megatron_ee.tokenizer.chat import open_chat_template

_SPLIT_DRAW = 2**32  # beside the epochs, which count from 0


class Epochs:
    """Sequences of one epoch after the other.

    Args:
        pack: epoch -> its sequences.
    """

    def __init__(self, pack: Callable[[int], Packing]) -> None:
        self._pack = pack
        self._ends: list[int] = []  # of each epoch that was packed, in sequences from the beginning
        self._kept: dict[int, Packing] = {}

    def sequence(self, index: int) -> np.ndarray:
        """The conversations of a sequence. The first look beyond the epochs seen so far packs those in between."""
        while not self._ends or index >= self._ends[-1]:
            epoch = len(self._ends)
            self._ends.append((self._ends[-1] if epoch else 0) + len(self.packing(epoch)))
        epoch = int(np.searchsorted(self._ends, index, side="right"))
        return self.packing(epoch)[index - (self._ends[epoch - 1] if epoch else 0)]

    def packing(self, epoch: int) -> Packing:
        """Two are kept: a batch may reach from one into the next."""
        if epoch not in self._kept:
            self._kept = {other: packing for other, packing in self._kept.items() if other == epoch - 1}
            self._kept[epoch] = self._pack(epoch)
        return self._kept[epoch]


class ChatSamples:
    """A `SampleSource` of conversations, epoch after epoch without an end.

    Sample i is the same whenever it is asked for: it depends on the conversations, the seed and i.

    Args:
        chosen: the numbers of the conversations to draw from.
        fill: the token after the last conversation of a sequence; never learned, and seen by nothing but itself.
    """

    def __init__(
        self,
        conversations: Conversations,
        chosen: np.ndarray,
        *,
        sequence_length: int,
        packs: bool,
        seed: int,
        fill: int,
        num_samples: int,
    ) -> None:
        self._conversations, self._chosen = conversations, chosen
        self._sequence_length, self._fill, self._num_samples = sequence_length, fill, num_samples
        self._lengths, self._packs = conversations.lengths[chosen], packs

        def pack_epoch(epoch: int) -> Packing:
            if not packs:
                return one_each(len(chosen), seed=seed, epoch=epoch)
            return pack(self._lengths, sequence_length, seed=seed, epoch=epoch)

        self._epochs = Epochs(pack_epoch)

    def __len__(self) -> int:
        """Those that a run asks for; there are more."""
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        numbers = self._chosen[self._epochs.sequence(index)]
        lengths = (self._conversations.starts[numbers + 1] - self._conversations.starts[numbers] - 1).tolist()
        left = self._sequence_length - sum(lengths)
        sizes = [*lengths, left]
        of_tokens, of_learned = self._conversations.tokens, self._conversations.learned
        starts = self._conversations.starts[numbers].tolist()
        filling = np.full(left, self._fill)

        def join(values: np.ndarray, offset: int, end: np.ndarray) -> np.ndarray:
            parts = [values[start + offset :][:size] for start, size in zip(starts, lengths, strict=True)]
            return np.concatenate([*parts, end])

        sample = {
            "tokens": torch.from_numpy(join(of_tokens, 0, filling).astype(np.int64)),
            "labels": torch.from_numpy(join(of_tokens, 1, filling).astype(np.int64)),
            "loss_mask": torch.from_numpy(join(of_learned, 1, np.zeros(left)).astype(np.float32)),
        }
        if not self._packs:
            return sample  # what is after the only conversation is seen by nothing that counts
        return {
            **sample,
            "positions": torch.from_numpy(np.concatenate([np.arange(size) for size in sizes])),
            "documents": torch.from_numpy(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)),
        }

    def describe(self) -> str:
        """How many there are, and how full the first epoch's sequences are."""
        packing, positions = self._epochs.packing(0), int(self._lengths.sum())
        share = positions / (len(packing) * self._sequence_length)
        conversations = f"{len(self._chosen):,} conversations of {positions:,} tokens"
        return f"{conversations} in {len(packing):,} sequences, {share:.1%} full"


def open_chat_samples(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, num_samples: Sequence[int]
) -> tuple[ChatSamples, ChatSamples | None]:
    """The splits for training and validation. Collective: the main rank encodes what has to be.

    Args:
        num_samples: of each that the run asks for; no split for validation if there it is 0.

    Raises:
        FieldError: see `keep_conversations`; no chat template; or a split without conversations.
    """
    conversations = open_conversations(config.data, "dataset", tokenizer, mesh)
    train, valid = (np.arange(len(conversations)), None) if config.data.validation else _split(conversations, config)
    pools = [(conversations, train)]
    if num_samples[1]:
        if valid is None:
            conversations = open_conversations(config.data, "validation", tokenizer, mesh)
            valid = np.arange(len(conversations))
        pools.append((conversations, valid))
    samples = []
    for name, (conversations, chosen), count in zip(("training", "validation"), pools, num_samples, strict=False):
        if not len(chosen):
            raise FieldError(
                "data.split", f"no conversations left for {name}: {conversations.path} has {len(conversations)}"
            )
        samples.append(
            ChatSamples(
                conversations,
                chosen,
                sequence_length=config.data.sequence_length,
                packs=config.data.packing,
                seed=config.seed,
                fill=tokenizer.eod if tokenizer.pad == NO_PAD else tokenizer.pad,
                num_samples=count,
            )
        )
        if mesh.is_main:
            logging.getLogger("megatron_ee").info("%s: %s", name, samples[-1].describe())
    return samples[0], samples[1] if len(samples) > 1 else None


def open_conversations(data: DataConfig, name: str, tokenizer: Tokenizer, mesh: Mesh | None = None) -> Conversations:
    """The conversations of `data.dataset` or `data.validation`; without a mesh, this process is alone.

    Raises:
        FieldError: see `keep_conversations`, and `open_chat_template`.
    """
    path = Path(getattr(data, name))
    template = open_chat_template(data.chat_template, tokenizer)

    def keep() -> Path:
        return keep_conversations(
            path,
            Path(data.folder) / "conversations",
            tokenizer,
            template,
            data.sequence_length,
            field=f"data.{name}",
        )

    conversations = map_conversations(path, keep() if mesh is None else mesh.from_main(keep))
    left_out = conversations.describe_too_long(data.sequence_length)
    if left_out and (mesh is None or mesh.is_main):
        logging.getLogger("megatron_ee").warning("data.%s: %s", name, left_out)
    return conversations


def _split(conversations: Conversations, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the conversations for training and for validation, drawn by the seed."""
    drawn = random_order(len(conversations), config.seed, _SPLIT_DRAW)
    shares = np.cumsum(config.data.split) / max(sum(config.data.split), 1e-300)
    first, second = np.rint(shares[:2] * len(drawn)).astype(int)
    return np.sort(drawn[:first]), np.sort(drawn[first:second])
