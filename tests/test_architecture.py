"""The structure of the package, held by a test: imports go one way, and each outside library has one door."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ee.config import ModelConfig, load_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_ee"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A package may import those below it, never one beside or above it.
LEVELS = [
    ["server"],
    ["training", "inference"],
    ["checkpoint"],
    ["data", "model"],
    ["huggingface"],
    ["parallel"],
    ["config", "tokenizer", "device", "environment", "interrupts", "log", "plugins"],
    ["errors"],
]

# Outside library -> the files that may import it. The standard library, torch and numpy are everybody's.
DOORS = {
    "megatron": {
        "parallel/mesh.py",
        "data/dataset.py",
        "model/attention.py",
        "model/deferred_weights.py",
        "model/exit_head.py",
        "model/gate.py",
        "model/initialize.py",
        "model/layers.py",
        "model/split_vocabulary.py",
        "model/stage.py",
        "checkpoint/huggingface.py",
        "model/stage_parts.py",
        "checkpoint/in_place.py",
        "checkpoint/plans.py",
        "checkpoint/reading.py",
        "checkpoint/saver.py",
        "checkpoint/sharded.py",
        "training/gradients.py",
        "training/overlap.py",
        "training/megatron_runtime.py",
        "training/optimizers/adam_state.py",
        "training/optimizers/adamw.py",
        "training/optimizers/loss_scale.py",
        "training/optimizers/megatron.py",
    },
    "pydantic": {
        "server/protocol/requests.py",
        "server/protocol/settings.py",
        *(
            f"config/{name}.py"
            for name in ("exit_losses", "fields", "inference", "layerskip", "logging", "model", "operations")
        ),
        *(
            f"config/{name}.py"
            for name in (
                "parallel",
                "positions",
                "schema",
                "serving",
                "training",
                "loader",
                "like",
                "explain",
                "errors",
                "__main__",
            )
        ),
    },
    "apex": {"training/optimizers/fused.py"},
    "fastapi": {f"server/{name}.py" for name in ("app", "streams")},
    "prometheus_client": {"server/metrics.py"},
    "starlette": {f"server/{name}.py" for name in ("app", "streams", "transport")},
    "uvicorn": {"server/listening.py"},
    "deepspeed": {"training/optimizers/deepspeed_zero.py"},
    "transformer_engine": {"training/optimizers/fused.py"},
    "jinja2": {"tokenizer/chat.py"},
    "pydantic_core": {"config/explain.py"},
    "yaml": {"config/loader.py", "config/dialect.py"},
    "tokenizers": {"tokenizer/huggingface.py"},
    "tqdm": {"training/loggers/console.py", "data/preprocess.py"},
    "transformers": {"tokenizer/huggingface.py"},
    "wandb": {"training/loggers/wandb.py"},
    "xxhash": {"checkpoint/checksum.py"},
}

# Host logic: schedulers, plans, ledgers and settings are plain Python, tested in milliseconds.
WITHOUT_TORCH = [
    *(PACKAGE / "config").glob("*.py"),
    PACKAGE / "environment.py",
    PACKAGE / "errors.py",
    PACKAGE / "log.py",
    PACKAGE / "plugins.py",
    *(PACKAGE / "tokenizer").glob("*.py"),
    PACKAGE / "data/aside.py",
    PACKAGE / "data/sources.py",
    *(
        PACKAGE / f"huggingface/{name}.py"
        for name in ("settings", "rope", "architecture", "names", "headers", "exit_files", "generation", "truncated")
    ),
    PACKAGE / "parallel/balance.py",
    PACKAGE / "parallel/costs.py",
    PACKAGE / "parallel/estimate.py",
    PACKAGE / "parallel/chunks.py",
    PACKAGE / "parallel/layout.py",
    PACKAGE / "parallel/optimizer_memory.py",
    PACKAGE / "parallel/products.py",
    PACKAGE / "parallel/world.py",
    *(path for path in (PACKAGE / "parallel/pipeline").glob("*.py") if path.name != "runtime.py"),
    PACKAGE / "checkpoint/folders.py",
    PACKAGE / "checkpoint/description.py",
    PACKAGE / "checkpoint/prune.py",
    PACKAGE / "checkpoint/fingerprint.py",
    PACKAGE / "checkpoint/models.py",
    *(PACKAGE / "server/guard").glob("*.py"),
    PACKAGE / "training/curriculum.py",
    PACKAGE / "training/loss_weights.py",
    PACKAGE / "training/lr_schedule.py",
    PACKAGE / "training/operations/attempts.py",
    PACKAGE / "training/operations/heartbeat.py",
    PACKAGE / "training/operations/run_lock.py",
    PACKAGE / "training/operations/stopping.py",
    PACKAGE / "training/operations/watchdog.py",
    PACKAGE / "training/operations/whereabouts.py",
    PACKAGE / "training/planning.py",
    PACKAGE / "training/observation/step_times.py",
    PACKAGE / "training/observation/trace.py",
    *(
        PACKAGE / f"inference/{name}.py"
        for name in ("__main__", "asking", "borders", "command", "comparison", "completion", "growing_text", "llm")
    ),
    *(PACKAGE / f"inference/{name}.py" for name in ("prompts", "savings", "text", "work")),
    PACKAGE / "inference/declared_exits.py",
    PACKAGE / "inference/calibration/thresholds_file.py",
    PACKAGE / "inference/exit_depths.py",
    PACKAGE / "inference/exit_rule.py",
    PACKAGE / "inference/json_files.py",
    PACKAGE / "inference/ledger.py",
    PACKAGE / "inference/opening.py",
    PACKAGE / "inference/request.py",
    PACKAGE / "inference/sampling/check.py",
    *(PACKAGE / "inference/scheduling").rglob("*.py"),
    *(PACKAGE / f"inference/speculation/{name}.py" for name in ("law", "pace")),
    PACKAGE / "inference/show.py",
    PACKAGE / "inference/stage_layout.py",
    PACKAGE / "inference/text.py",
    *(
        PACKAGE / f"server/{name}.py"
        for name in ("bridge", "choices", "engine_loop", "generation", "offered", "orders")
    ),
    *(PACKAGE / f"server/{name}.py" for name in ("service", "settings", "templates", "tickets", "watchers")),
    *(PACKAGE / "server/guard").glob("*.py"),
    *(PACKAGE / "server/protocol").glob("*.py"),
]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def _level(part: str) -> int:
    (level,) = [number for number, names in enumerate(LEVELS) if part in names]
    return level


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    part = _part(path)
    for name in _imports(path):
        if not name.startswith("megatron_ee.") or part == "__init__" or path.name == "__main__.py":
            continue
        imported = name.split(".")[1]
        if imported != part:
            assert _level(imported) > _level(part), f"{part} may not import {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_outside_library_has_one_door(path: Path) -> None:
    for name in _imports(path):
        library = name.split(".")[0]
        if library in sys.stdlib_module_names or library in ("megatron_ee", "torch", "numpy"):
            continue
        assert library in DOORS, f"{library} has no door; choose one"
        assert str(path.relative_to(PACKAGE)) in DOORS[library], f"{library} is for {sorted(DOORS[library])}"


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=lambda path: str(path.relative_to(ROOT)))
def test_host_logic_imports_no_torch(path: Path) -> None:
    assert not {name for name in _imports(path) if name.split(".")[0] in ("torch", "numpy", "megatron")}


def test_only_the_device_package_asks_for_cuda() -> None:
    asking = [path for path in MODULES if "cuda.is_available" in path.read_text() and _part(path) != "device"]
    assert not asking


# Those of servers lie over a checkpoint's: tests/server/test_settings.py
RUNS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "serve"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    of_any = ModelConfig(num_layers=16, hidden_size=64, num_attention_heads=4)
    given = ["model.like=FOLDER", "checkpoint.initial=FOLDER"] if path.stem == "huggingface" else []
    load_config(path, given, read_model=lambda _folder: of_any)


def test_entry_file_only_composes() -> None:
    assert len((ROOT / "pretrain_ee.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("path", [*MODULES, ROOT / "pretrain_ee.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 50, f"{node.name} is long"
