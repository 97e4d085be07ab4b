"""What a model says of texts that are given to it (teacher-forced), at every exit and by every mode of decoding.

With exact keys and values a token that left early is to later ones as if it had run all layers. So one pass of full
depth over a text knows what each exit says of each token, and thus where decoding would have left, and with what.

Shapes: N tokens that are asked for, sequence after sequence, B sequences, S positions, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from evaluate_modes import Mode
from exit_observations import ask_all

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.corrections import check_shared_vocabulary, dola, sled
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.opened import OpenedModel

_NUMBERS = 2**25  # of logits that exist at a time


@dataclass(frozen=True, slots=True)
class Answers:
    """Of N tokens: what the right one costs, -log p in nats (fp64), and the likeliest one."""

    nats_N: np.ndarray
    choices_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Said:
    """
    Attributes:
        layers: by the outputs that were asked, ascending; the final one is the last.
        corrected: by the name of the mode that corrects the final logits.
        confidences: fp64 [N], of exits that may fire.
    """

    labels_N: np.ndarray
    layers: Mapping[int, Answers]
    corrected: Mapping[str, Answers]
    confidences: Mapping[int, np.ndarray]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mode says of N tokens, and the number of layers that it runs for each."""

    answers: Answers
    depths_N: np.ndarray


class TeacherForced:
    """Asks a model what modes of decoding say.

    Args:
        every_exit: whether all exits are asked, also those that no mode needs.

    Raises:
        FieldError: a mode doesn't fit the model; or one pass over a text says nothing of it.
    """

    def __init__(self, model: OpenedModel, modes: Sequence[Mode], *, every_exit: bool = False) -> None:
        if model.pipeline is not None:
            raise FieldError("inference.parallel.pipeline", "texts are evaluated by one process, with the whole model")
        self._model, self._final = model, model.stage.model.num_layers
        self._rules = {mode.name: ExitRule(mode.exit, model.exits, model.gated) for mode in modes}
        self._corrections = {mode.name: mode.exit for mode in modes if self._rules[mode.name].heard}
        for mode in modes:
            _check(model, mode, self._rules[mode.name])
        self._measured = sorted({layer for rule in self._rules.values() for layer in rule.thresholds})
        self._asked = (*(model.exits if every_exit else self._measured), self._final)
        self._measure = model.measure_named(modes[0].exit.measure) if self._measured else None

    @torch.inference_mode()
    def said(self, sequences: Sequence[Sequence[int]], scored: Sequence[int]) -> Said:
        """
        Args:
            sequences: of tokens; they run together, so a few of about one length.
            scored: of each, so many of its last tokens are asked for: all but the first one, at most.

        Raises:
            UserError: logits are no numbers.
        """
        tokens_BS, labels_SB = self._padded(sequences, scored)
        order_N = _by_sequence(labels_SB)
        rows = max(1, _NUMBERS // (self._model.tokenizer.vocab_size * (len(self._model.exits) + 1)))
        exits = dict(ask_all(self._model, tokens_BS, rows=rows))
        heard = _Heard()
        for labels_R in torch.split(labels_SB.flatten(), rows):
            wanted = torch.nonzero(labels_R >= 0).flatten().tolist()
            here = {layer: next(parts).of(wanted) for layer, parts in exits.items()}
            if wanted:
                self._hear(here, labels_R[wanted], heard)
        return heard.joined(labels_SB[labels_SB >= 0].cpu().numpy(), order_N)

    def outcome(self, mode: Mode, said: Said) -> Outcome:
        """What the mode says: of early exit, the first exit that fires. Drafts change nothing: full depth says."""
        depths_N = self._depths(self._rules[mode.name], said)
        if mode.name in said.corrected:
            return Outcome(said.corrected[mode.name], depths_N)
        final = said.layers[self._final]
        nats_N, choices_N = final.nats_N.copy(), final.choices_N.copy()
        for layer in self._measured:
            left_N, answers = depths_N == layer, said.layers[layer]
            nats_N[left_N], choices_N[left_N] = answers.nats_N[left_N], answers.choices_N[left_N]
        return Outcome(Answers(nats_N, choices_N), depths_N)

    def _depths(self, rule: ExitRule, said: Said) -> np.ndarray:
        """`ExitRule.fires`, of all tokens together."""
        depths_N = np.full(len(said.labels_N), self._final)
        streak_N, before_N = np.zeros_like(depths_N), np.full_like(depths_N, -1)
        for layer, threshold in rule.thresholds.items():
            choices_N = said.layers[layer].choices_N
            streak_N = np.where(choices_N == before_N, streak_N + 1, 1)
            fires_N = (said.confidences[layer] >= threshold) & (streak_N >= rule.patience)
            depths_N[fires_N & (depths_N == self._final)] = layer
            before_N = choices_N
        return depths_N

    def _padded(self, sequences: Sequence[Sequence[int]], scored: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, S], and the ones after them [S, B], -1 where nothing is asked. No token sees what is behind it."""
        longest = max(map(len, sequences))
        tokens_BS = np.zeros((len(sequences), longest - 1), dtype=np.int64)
        labels_BS = np.full_like(tokens_BS, -1)
        for row, (sequence, count) in enumerate(zip(sequences, scored, strict=True)):
            assert 0 < count < len(sequence), "the first token has nothing before it"
            last = len(sequence) - 1
            tokens_BS[row, :last] = sequence[:-1]
            labels_BS[row, last - count : last] = sequence[-count:]
        device = next(self._model.stage.parameters()).device
        return torch.from_numpy(tokens_BS).to(device), torch.from_numpy(labels_BS).to(device).T.contiguous()

    def _hear(self, here: Mapping[int, AskedExit], labels_N: torch.Tensor, heard: "_Heard") -> None:
        for layer in self._asked:
            heard.add(heard.layers, layer, here[layer].logits, labels_N)
        for layer in self._measured:
            assert self._measure is not None
            heard.confidences.setdefault(layer, []).append(self._measure(here[layer]))
        for name, params in self._corrections.items():
            final_NV = here[self._final].logits
            heads = [here[layer] for layer in self._rules[name].heard]
            early = [head.logits if params.hears_heads else head.output_logits for head in heads]
            heard.add(heard.corrected, name, _corrected(final_NV, early, params), labels_N)


class _Heard:
    """Answers that come in parts."""

    def __init__(self) -> None:
        self.layers: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.corrected: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.confidences: dict[int, list[torch.Tensor]] = {}

    def add(self, into: dict, name: int | str, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> None:
        if not bool(logits_NV.amax(-1).isfinite().all()):
            raise UserError(f"the logits of {f'exit {name}' if isinstance(name, int) else name} are no numbers")
        log_p_NV = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        nats_N = -log_p_NV.gather(-1, labels_N[:, None])[:, 0]
        into.setdefault(name, []).append((nats_N, logits_NV.argmax(-1)))

    def joined(self, labels_N: np.ndarray, order_N: np.ndarray) -> Said:
        def whole(parts: Sequence[torch.Tensor]) -> np.ndarray:
            # in fp64, as `ExitRule.fires` compares Python's numbers
            return torch.cat(list(parts)).double().cpu().numpy()[order_N]

        def answers(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Answers:
            nats, choices = zip(*parts, strict=True)
            return Answers(whole(nats), whole(choices).astype(np.int64))

        return Said(
            labels_N[order_N],
            {layer: answers(parts) for layer, parts in self.layers.items()},
            {name: answers(parts) for name, parts in self.corrected.items()},
            {layer: whole(parts) for layer, parts in self.confidences.items()},
        )


def in_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of sequences, the longest first, so that those that run together are about as long."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _check(model: OpenedModel, mode: Mode, rule: ExitRule) -> None:
    if rule.thresholds and rule.kv_policy == "propagate":
        raise FieldError(
            "inference.exit.kv_policy",
            "with propagate a token that leaves early changes what later ones see, so that a text that is given says "
            "nothing of decoding; texts and choices are evaluated with recompute or fill",
        )
    if mode.exit.mode in ("sled", "dola"):
        check_shared_vocabulary(model.facts, mode.exit.mode, rule.heard)


def _corrected(final_NV: torch.Tensor, early: Sequence[torch.Tensor], params: ExitParams) -> torch.Tensor:
    """As decoding has them, but for SLED's tokens out of the race, which keep what full depth says: it rules them out,
    which no likelihood of a given text survives."""
    if params.mode == "dola":
        return dola(final_NV, early, params.dola)
    evolved_NV = sled(final_NV, early, params.sled)
    return torch.where(evolved_NV == params.sled.lower_bound, final_NV, evolved_NV)


def _by_sequence(labels_SB: torch.Tensor) -> np.ndarray:
    """The order that makes of position after position sequence after sequence."""
    positions_N, sequences_N = (index.cpu().numpy() for index in torch.nonzero(labels_SB >= 0, as_tuple=True))
    return np.lexsort((positions_N, sequences_N))
