"""Full depth beside Hugging Face's `generate`, on the same parameters and prompts."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_decode_setup import Decoding, Prompts, Sizes, context_of, full_depth
from bench_report import Measure, all_take_turns, measure_of

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel

GOALS = {1: 2.0, 16: 1.4}
"""By the number of sequences: tokens per second over Hugging Face's."""


def full_depth_measures(
    huggingface: Any, model: "OpenedModel", prompts: Prompts, all_sizes: Sequence[Sizes]
) -> list[Measure]:
    """Tokens per second over Hugging Face's, for each number of sequences."""
    return [_over_huggingface(huggingface, model, prompts, sizes) for sizes in all_sizes]


def exported(checkpoint: Path) -> Any:
    """The same model, as transformers loads it, in fp32."""
    import transformers

    from megatron_ee.checkpoint.to_huggingface import export_model

    library: Any = transformers  # which is not typed
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()  # `generate` warns of how it calls itself
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        destination = export_model(checkpoint, Path(folder) / "exported").folder
        model = library.AutoModelForCausalLM.from_pretrained(destination, dtype=torch.float32, local_files_only=True)
    model.generation_config.eos_token_id = None  # so that every text has the same length
    model.generation_config.pad_token_id = 0
    return model.eval()


@dataclass
class HuggingFaceDecoding:
    """Greedy `generate`, with its cache, of each round's prompts.

    Attributes:
        said: the tokens of each round, and of each of its prompts.
    """

    model: Any
    prompts: Prompts
    sizes: Sizes
    said: dict[int, list[list[int]]] = field(default_factory=dict)

    def __call__(self, number: int) -> float:
        """CPU seconds of a round."""
        ids_BS = torch.tensor(self.prompts.of_round(number, self.sizes.sequences))
        seen_BS = torch.ones_like(ids_BS)
        started = time.process_time()
        with torch.inference_mode():
            text_BS = self.model.generate(
                ids_BS, attention_mask=seen_BS, max_new_tokens=self.sizes.new_tokens, do_sample=False
            )
        seconds = time.process_time() - started
        self.said[number] = text_BS[:, ids_BS.shape[1] :].tolist()
        return seconds


def same_tokens(ours: Decoding, theirs: HuggingFaceDecoding) -> float:
    """The share of texts that are the same to the last token; where two logits are nearly equal, rounding decides."""
    pairs = [
        ([emission.token for emission in said], text)
        for number in ours.said
        for said, text in zip(ours.said[number], theirs.said[number], strict=True)
    ]
    return sum(said == text for said, text in pairs) / len(pairs)


def _over_huggingface(model: Any, own: "OpenedModel", prompts: Prompts, sizes: Sizes) -> Measure:
    ours, theirs = Decoding(own, prompts, sizes, full_depth()), HuggingFaceDecoding(model, prompts, sizes)
    (rounds,) = all_take_turns(sizes.full_rounds, ours, [theirs])
    tokens = sizes.sequences * sizes.new_tokens
    context = context_of(
        sizes,
        tokens_per_cpu_second=tokens / statistics.median(rounds.a),
        huggingface_tokens_per_cpu_second=tokens / statistics.median(rounds.b),
        same_tokens=same_tokens(ours, theirs),
    )
    name = f"full_depth_over_huggingface_b{sizes.sequences}"
    return measure_of(name, rounds.paired, "higher", rounds.aa, context, goal=GOALS.get(sizes.sequences))
