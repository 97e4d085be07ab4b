"""A run of two stages that is long enough to be disturbed, and what its record says."""

import json
from pathlib import Path

from helpers.runs import write_small_dataset

CONFIG = """\
runs: {folder}/runs
device: cpu
model: {{num_layers: 4, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}}
exits: {{layers: [1, 2], weight_schedule: {{warmup_iters: 4}}}}
parallel: {{pipeline: 2}}
data: {{dataset: {folder}/words, folder: {folder}/data, sequence_length: 32}}
training: {{train_iters: {iters}, global_batch_size: 8, micro_batch_size: 1, eval_interval: 30, eval_iters: 1}}
optimizer: {{lr: 1e-2}}
checkpoint: {{interval: 25}}
logging: {{interval: 7}}
"""


def write_long_run(folder: Path, *, train_iters: int) -> Path:
    """Its dataset and its config, which wants a name; returns the config's path."""
    write_small_dataset(folder)
    path = folder / "long.yaml"
    path.write_text(CONFIG.format(folder=folder, iters=train_iters))
    return path


def read_losses(run: Path) -> list[dict[str, float]]:
    """What the record says of losses, which nothing may change; not of times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: of[name] for name in of if name == "iteration" or name.startswith(("train/", "val/"))} for of in records
    ]


def has_iteration(run: Path, iteration: int) -> bool:
    """Whether the record has come to an iteration."""
    path = run / "metrics.jsonl"
    return path.exists() and f'"iteration": {iteration},' in path.read_text()
