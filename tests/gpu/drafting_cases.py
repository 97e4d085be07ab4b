"""What the tests of self-speculation run on a rank."""

from typing import Any
from unittest.mock import patch

import torch
from gpu.cases import DeviceName, device_of
from helpers.decoding import decode, full_logits, opened, request, tokens_of
from helpers.drafts import acceptance, drafting, prompts, weaken
from helpers.models import whole_model

from megatron_ee.config import ExitParams, ParallelConfig
from megatron_ee.inference import depth_walk
from megatron_ee.inference.batch import Batch
from megatron_ee.parallel.mesh import open_mesh


def drafted(name: DeviceName) -> dict[str, Any]:
    """Drafts beside other modes, with CUDA graphs where they are and without them: texts, how far behind the likeliest
    token theirs are, in logits of one pass without a cache, and how much of the cache is left where no text is."""
    stage = whole_model(open_mesh(ParallelConfig(), device_of(name)), exits=[2, 5])
    weaken(stage, after=2, factor=0.3)
    model, asked = opened(stage), prompts(6)
    modes: list[tuple[ExitParams, float]] = [
        (drafting(draft_exit=2, draft_length=4), 0.0),
        (drafting(draft_exit=5, draft_length=2), 0.0),
        (drafting(), 0.0),
        (ExitParams(mode="full"), 0.0),
        (drafting(draft_exit=2, draft_length=3), 1.0),
        (ExitParams(threshold=0.03), 0.0),
    ]
    requests = [
        request(prompt, params, temperature=temperature, seed=3, max_new_tokens=24)
        for prompt, (params, temperature) in zip(asked, modes, strict=True)
    ]

    def run() -> tuple[Batch, Any]:
        batch = Batch(model, slots=6, capacity=48)
        return batch, decode(batch, requests)

    batch, texts = run()
    with patch.object(depth_walk, "capture_on", return_value=None):
        _, plain_texts = run()
    behind = 0.0
    for prompt, text in zip(asked[:4], texts, strict=False):
        tokens = tokens_of(text)
        logits_SV = full_logits(stage, [*prompt, *tokens], 8)[len(prompt) - 1 : -1]
        behind = max(behind, float((logits_SV.amax(-1) - logits_SV[torch.arange(len(tokens)), tokens]).max()))
    graphs = batch.walk._graphs
    ends = [len(prompt) + 23 for prompt in asked]
    left = [
        sum(part_GTD[:, end:].count_nonzero() for part_GTD in batch.walk.cache.read(1, slot, 47))
        for slot, end in enumerate(ends)
    ]
    return {
        "same": [tokens_of(text) for text in texts] == [tokens_of(text) for text in plain_texts],
        "behind": behind,
        "acceptance": acceptance(texts),
        "left": int(sum(left)),
        "graphs": 0 if graphs is None else graphs.num_graphs,
    }
