"""Properties of any config: what is written reads back equal, and what is wrong is a ConfigError, nothing else."""

import io
import string
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.config import Config, ConfigError, load_config, to_yaml
from megatron_ee.config.__main__ import main

TRAINING = "training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}\n"

counts = st.integers(1, 10**6)
numbers = st.one_of(st.integers(0, 100), st.floats(0, 1e300, allow_subnormal=False))
probabilities = st.floats(0, 1)
ambiguous = st.sampled_from(["1e5", "yes", "null", "~", "", "3", "0x1", "2024-01-01", "a: b", "- a", "# a", "<<"])
breaking = st.sampled_from(["\ufeff", "\x85", "a\n b\u2028", " a ", "a " * 100])
texts = st.one_of(st.text(), ambiguous, breaking)

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
keys = st.one_of(st.integers(0, 9), texts)
junk = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3))
)


SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"kind": "linear", "factor": 2},
    {"kind": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
    {"kind": "yarn", "factor": 4, "original_max_position_embeddings": 64, "attention_factor": None},
]


@st.composite
def sampling_params(draw: st.DrawFn) -> dict[str, Any]:
    least, more = draw(st.integers(0, 50)), draw(st.integers(1, 50))
    penalties = st.floats(-2, 2)
    return {
        "max_new_tokens": least + more,
        "min_new_tokens": least,
        "temperature": draw(numbers),
        "top_k": draw(st.integers(0, 100)),
        "top_p": draw(st.one_of(st.just(1), st.floats(0, 1, exclude_min=True))),
        "min_p": draw(probabilities),
        "frequency_penalty": draw(penalties),
        "presence_penalty": draw(penalties),
        "logit_bias": draw(st.dictionaries(st.integers(0, 9), st.floats(-1e300, 1e300), max_size=2)),
        "seed": draw(st.one_of(st.none(), st.integers(0, 2**64))),
        "stop": draw(st.lists(texts.filter(bool), max_size=3)),
        "stop_token_ids": draw(st.lists(st.integers(0, 9), max_size=2)),
        "ignore_eos": draw(st.booleans()),
        "logprobs": draw(st.one_of(st.none(), st.integers(0, 5))),
    }


@st.composite
def valid_trees(draw: st.DrawFn) -> dict[str, Any]:
    schedule = draw(st.sampled_from(["1f1b", "gpipe", "interleaved"]))
    pipeline, chunks = (draw(st.integers(2, 3)), 2) if schedule == "interleaved" else (draw(st.integers(1, 4)), 1)
    tensor, data_size = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    stages = draw(st.lists(st.integers(1, 6), min_size=pipeline * chunks, max_size=pipeline * chunks))
    layers = sorted(draw(st.sets(st.integers(1, sum(stages) - 1), max_size=4))) if sum(stages) > 1 else []
    micro_batch_size = draw(st.integers(1, 8))
    lr = draw(st.floats(1e-12, 10))
    exits: dict[str, Any] = {"layers": layers, "projection": draw(st.sampled_from(["shared", "own"]))}
    if draw(st.booleans()):
        exits["weights"] = draw(st.lists(numbers, min_size=len(layers), max_size=len(layers)))
    moved = [False, *(draw(st.booleans()) for _ in stages[1:])]  # whether a border exit is at the start of a stage
    placements = [
        {"layers": count, "exits_at_start": at_start, "exits_at_end": not next_at_start}
        for count, at_start, next_at_start in zip(stages, moved, [*moved[1:], False], strict=True)
    ]
    some_exits, at_most = (st.sampled_from(layers), 3) if layers else (st.nothing(), 0)
    model = {
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from(SCALINGS).map(lambda scaling: scaling and dict(scaling))),
        "sliding_window": draw(counts),
        "sliding_window_layers": draw(st.sampled_from(["all", layers])),
    }
    return {
        "name": draw(st.text(string.ascii_letters + string.digits, min_size=1)),
        "runs": draw(texts),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "model": {
            **model,
            "num_layers": sum(stages),
            "hidden_size": draw(counts),
            "num_attention_heads": tensor * draw(st.integers(1, 64)),
            "head_dim": 2 * draw(counts),
            "ffn_hidden_size": tensor * draw(counts),
            "vocab_size": draw(st.one_of(counts.map(lambda count: tensor * count), st.just("auto"))),
        },
        "exits": exits,
        "parallel": {
            "tensor": tensor,
            "pipeline": pipeline,
            "chunks": chunks,
            "data": draw(st.sampled_from(["auto", data_size])),
            "schedule": schedule,
            "layout": draw(st.sampled_from(["auto", placements])),
        },
        "logging": {"wandb": draw(st.sampled_from([None, {"project": "p", "entity": None, "tags": ["a"]}]))},
        "data": {
            "dataset": draw(st.one_of(texts, st.just([{"path": "a", "weight": 1}, {"path": "b", "weight": 0.5}]))),
            "tokenizer": "bytes",
            "split": draw(st.tuples(numbers, numbers, numbers).map(list)),
        },
        "training": {
            "train_iters": draw(counts),
            "global_batch_size": micro_batch_size * data_size * pipeline * draw(st.integers(1, 3)),
            "micro_batch_size": micro_batch_size,
        },
        "optimizer": {"lr": lr, "min_lr": lr * draw(probabilities), "beta1": draw(st.floats(0, 1, exclude_max=True))},
        "inference": {
            "parallel": draw(
                st.sampled_from(
                    [
                        {},
                        {"pipeline": len(stages), "layout": stages},
                        {"pipeline": len(stages), "layout": "survival", "depths": "a depths.json"},
                    ]
                )
            ),
            "sampling": draw(sampling_params()),
            "exit": {
                "mode": draw(st.sampled_from(["full", "early_exit"])),
                "draft_exit": draw(st.sampled_from(["auto", *layers])),
                "draft_length": draw(st.sampled_from(["auto", 1, 12])),
                "draft_threshold": draw(probabilities),
                "measure": draw(st.sampled_from(["max_probability", "margin", "entropy", "cosine"])),
                "threshold": draw(probabilities),
                "thresholds": draw(st.dictionaries(some_exits, probabilities, max_size=at_most)),
                "exits": draw(st.one_of(st.none(), st.lists(some_exits, max_size=at_most))),
                "patience": draw(counts),
                "kv_policy": draw(st.sampled_from(["recompute", "fill", "propagate"])),
            },
        },
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


@given(valid_trees())
@settings(max_examples=25)
def test_what_is_written_reads_back_equal(path: Path, tree: dict[str, Any]) -> None:
    config = Config.model_validate(tree)
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    again = load_config(path)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@given(valid_trees(), st.data())
@settings(max_examples=50)
def test_a_mutated_tree_loads_or_is_explained(path: Path, tree: dict[str, Any], data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        _mutate(tree, data)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    _loads_or_explains(path)


@given(valid_trees(), st.data())
@settings(max_examples=100)
def test_whatever_loads_is_estimated_or_explained(path: Path, tree: dict[str, Any], data: st.DataObject) -> None:
    processes_of_pipeline = tree["parallel"]["tensor"] * tree["parallel"]["pipeline"]
    fitting = st.integers(1, 3).map(lambda data_size: data_size * processes_of_pipeline)
    world_size = data.draw(st.one_of(st.none(), fitting, st.integers(1, 10**30)))
    for _ in range(data.draw(st.integers(0, 2))):
        _mutate(tree, data)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    if not _is_slow_to_estimate(path):
        _estimates_or_explains(path, *([] if world_size is None else ["--world-size", str(world_size)]))


@given(valid_trees(), st.data())
@settings(max_examples=50)
def test_mutated_text_loads_or_is_explained(path: Path, tree: dict[str, Any], data: st.DataObject) -> None:
    text = yaml.safe_dump(tree)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 20)))
    noise = data.draw(st.one_of(st.text(max_size=5), st.text("&*!|>{}[],:?-#%@\"'\\ \n<~0eE.", max_size=8)))
    path.write_bytes((text[:start] + noise + text[stop:]).encode("utf-8", "surrogatepass"))
    _loads_or_explains(path)


@given(st.one_of(st.text(), st.tuples(st.from_regex(r"[a-z]+(\.[a-z0-9]+){0,3}"), texts).map("=".join)))
@settings(max_examples=50)
def test_any_override_loads_or_is_explained(path: Path, override: str) -> None:
    path.write_text("name: run\nmodel: {num_layers: 8, hidden_size: 64, num_attention_heads: 4}\n" + TRAINING)
    _loads_or_explains(path, override)


def _mutate(tree: dict[str, Any], data: st.DataObject) -> None:
    """Drop, replace or add one entry, anywhere in the tree."""
    holders = [tree]
    for holder in holders:
        values = holder.values() if isinstance(holder, dict) else holder
        holders += [value for value in values if value and isinstance(value, dict | list)]
    holder = data.draw(st.sampled_from(holders))
    if not holder:
        return
    key = data.draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    match data.draw(st.sampled_from(["drop", "replace", "add"])):
        case "drop":
            del holder[key]
        case "replace":
            holder[key] = data.draw(junk)
        case "add" if isinstance(holder, dict):
            holder[data.draw(keys)] = data.draw(junk)
        case "add":
            holder.append(data.draw(junk))


def _loads_or_explains(path: Path, *overrides: str) -> None:
    problems = []
    try:
        load_config(path, overrides)
    except ConfigError as error:
        problems = error.problems or ["no reason given"]
    assert all(problem.isprintable() for problem in problems)
    assert all(problem.startswith((str(path), "override ")) for problem in problems)


def _is_slow_to_estimate(path: Path) -> bool:
    """The estimate makes the plan of a whole step, so its time grows with stages and micro-batches."""
    try:
        config = load_config(path)
    except ConfigError:
        return False
    return config.parallel.pipeline * config.parallel.chunks * config.training.global_batch_size > 10**4


def _estimates_or_explains(path: Path, *options: str) -> None:
    """The command as it is, but in this process."""
    command = ["config", str(path), "--estimate", *options]
    with (
        patch.object(sys, "argv", command),
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        status = main()
    said, problems = out.getvalue(), err.getvalue().splitlines()
    assert (status, bool(said), bool(problems)) in [(0, True, False), (2, False, True)]
    assert all(problem.startswith(f"{path}:") for problem in problems)
