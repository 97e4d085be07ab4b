"""Properties of any config: what is written reads back equal, and what is wrong is a ConfigError, nothing else."""

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.config import Config, ConfigError, load_config, to_yaml

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


@st.composite
def valid_trees(draw: st.DrawFn) -> dict[str, Any]:
    stages = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
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
    return {
        "name": draw(st.text(string.ascii_letters + string.digits, min_size=1)),
        "runs": draw(texts),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "model": {
            "num_layers": sum(stages),
            "hidden_size": draw(counts),
            "num_attention_heads": draw(st.integers(1, 64)),
            "head_dim": 2 * draw(counts),
            "vocab_size": draw(st.one_of(counts, st.just("auto"))),
        },
        "exits": exits,
        "parallel": {"pipeline": len(stages), "layout": draw(st.sampled_from(["auto", placements]))},
        "data": {"dataset": draw(texts), "split": draw(st.tuples(numbers, numbers, numbers).map(list))},
        "training": {
            "train_iters": draw(counts),
            "global_batch_size": micro_batch_size * draw(st.integers(1, 8)),
            "micro_batch_size": micro_batch_size,
        },
        "optimizer": {"lr": lr, "min_lr": lr * draw(probabilities), "beta1": draw(st.floats(0, 1, exclude_max=True))},
        "inference": {
            "exit": {
                "threshold": draw(probabilities),
                "thresholds": draw(st.dictionaries(some_exits, probabilities, max_size=at_most)),
                "exits": draw(st.one_of(st.none(), st.lists(some_exits, max_size=at_most))),
            }
        },
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


@given(valid_trees())
@settings(max_examples=25, deadline=None)
def test_what_is_written_reads_back_equal(path: Path, tree: dict[str, Any]) -> None:
    config = Config.model_validate(tree)
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    again = load_config(path)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@given(valid_trees(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_mutated_tree_loads_or_is_explained(path: Path, tree: dict[str, Any], data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        _mutate(tree, data)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    _loads_or_explains(path)


@given(valid_trees(), st.data())
@settings(max_examples=50, deadline=None)
def test_mutated_text_loads_or_is_explained(path: Path, tree: dict[str, Any], data: st.DataObject) -> None:
    text = yaml.safe_dump(tree)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 20)))
    noise = data.draw(st.one_of(st.text(max_size=5), st.text("&*!|>{}[],:?-#%@\"'\\ \n<~0eE.", max_size=8)))
    path.write_bytes((text[:start] + noise + text[stop:]).encode("utf-8", "surrogatepass"))
    _loads_or_explains(path)


@given(st.one_of(st.text(), st.tuples(st.from_regex(r"[a-z]+(\.[a-z0-9]+){0,3}"), texts).map("=".join)))
@settings(max_examples=50, deadline=None)
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
