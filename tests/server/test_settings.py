"""What a server is started with: a serve file over the checkpoint's own config, and overrides over both."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ee.config import Config, ConfigError, load_config, to_yaml
from megatron_ee.config.dialect import to_text
from megatron_ee.errors import FieldError, UserError
from megatron_ee.server.settings import open_serving_config

ROOT = Path(__file__).parents[2]
DECIDES = "a server decides on serving, inference, exits, device, seed, plugins and data.tokenizer"

HUGGING_FACE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def _write_run(folder: Path, **changes: Any) -> Path:
    """As much of a run as is read before its parameters are."""
    step = folder / "checkpoints/step_00000007"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(to_yaml(tiny_config(name=folder.name, **changes)))
    (step / "format.json").write_text("{}")
    return step


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a run in `run`."""
    monkeypatch.chdir(tmp_path)
    _write_run(Path("run"), inference={"max_batch_size": 3, "exit": {"threshold": 0.5, "thresholds": {2: 0.25}}})
    return tmp_path


def _open(file: str | None, *overrides: str, model: str | None = "run") -> tuple[Path, Config]:
    path = None
    if file is not None:
        path = Path("serve.yaml")
        path.write_text(file)
    with open_serving_config(path, overrides, model=None if model is None else Path(model)) as opened:
        return opened


def _message(file: str | None, *overrides: str, model: str | None = "run") -> list[str]:
    with pytest.raises(UserError) as caught:
        _open(file, *overrides, model=model)
    return str(caught.value).splitlines()


def test_a_serve_file_lies_over_the_checkpoint_and_overrides_over_both(here: Path) -> None:
    file = "serving: {port: 9000, timeout: 5.0}\ninference: {exit: {threshold: 0.75, thresholds: {5: 0.5}}}"
    folder, config = _open(file, "serving.timeout=7.0", "seed=3")
    assert folder == Path("run/checkpoints/step_00000007")
    assert (config.name, config.model.num_layers, config.seed) == ("run", 8, 3)
    assert (config.serving.port, config.serving.timeout, config.serving.model) == (9000, 7.0, "run")
    assert config.inference.max_batch_size == 3
    assert (config.inference.exit.threshold, config.inference.exit.thresholds) == (0.75, {2: 0.25, 5: 0.5})


def test_no_file_is_needed(here: Path) -> None:
    own = Config.model_validate(tiny_config(name="run", inference={"max_batch_size": 3}).model_dump())
    _, config = _open(None, "serving.port=0")
    assert config.serving.port == 0
    assert (config.model, config.inference.max_batch_size) == (own.model, 3)


def test_a_base_of_a_serve_file_is_a_serve_file(here: Path) -> None:
    Path("base.yaml").write_text("serving: {port: 9000, model: run}\nlogging: {interval: 1}")
    assert _message("base: base.yaml") == [f"base.yaml:2:1: logging: is the checkpoint's; {DECIDES}"]
    Path("base.yaml").write_text("serving: {port: 9000, model: run}")
    _, config = _open("base: base.yaml\nserving: {host: 0.0.0.0}", model=None)
    assert (config.serving.port, config.serving.host) == (9000, "0.0.0.0")


def test_the_model_is_named_by_flag_override_or_file(here: Path) -> None:
    steps = {name: _write_run(Path(name)) for name in ("in_file", "in_override", "by_flag")}
    file = "serving: {model: in_file}"
    assert _open(file, model=None)[0] == steps["in_file"]
    assert _open(file, "serving.model=in_override", model=None)[0] == steps["in_override"]
    folder, config = _open(file, "serving.model=in_override", model="by_flag")
    assert (folder, config.serving.model) == (steps["by_flag"], "by_flag")
    assert _open(None, f"serving.model={steps['in_file']}", model=None)[0] == steps["in_file"]


def test_a_hugging_face_folder_has_no_config_of_its_own(here: Path) -> None:
    Path("hf").mkdir()
    Path("hf/config.json").write_text(json.dumps(HUGGING_FACE))
    exits = "exits: {layers: [1, 3], norm: shared}"
    assert _message(f"serving: {{port: 1}}\n{exits}", model="hf") == [
        "hf: data.tokenizer: hf has no tokenizer, so one has to be named"
    ]
    for file, overrides in ((f"{exits}\ndata: {{tokenizer: bytes}}", []), (exits, ["data={tokenizer: bytes}"])):
        folder, config = _open(file, *overrides, model="hf")
        assert (folder, config.exits.layers, config.data.tokenizer) == (Path("hf"), (1, 3), "bytes")
    assert _message("exits: {layers: [9]}", "data.tokenizer=bytes", model="hf") == [
        "serve.yaml:1:18: exits.layers.0: 9 must be below num_layers = 4"
    ]


def test_plug_ins_of_a_run_are_named_again(here: Path) -> None:
    _write_run(Path("own"), plugins=["parts.py"])
    (message,) = _message("serving: {port: 1}", model="own")
    assert message.startswith("own/checkpoints/step_00000007/config.yaml:")
    assert message.endswith("say what may be run: plugins=[parts.py] or []")
    assert _open("plugins: [parts.py]", model="own")[1].plugins == ("parts.py",)
    assert _open("plugins: [parts.py]", "plugins=[]", model="own")[1].plugins == ()


MESSAGES: dict[str, tuple[str | None, Sequence[str], str | None, Sequence[str]]] = {
    "a section of training": (
        "serving: {port: 1}\ntraining:\n  train_iters: 3",
        [],
        "run",
        [f"serve.yaml:2:1: training: is the checkpoint's; {DECIDES}"],
    ),
    "all of them, and each other mistake": (
        "optimizer: {lr: 1}\nname: a\nserving: {prt: 1}\ndata: {split: [1, 1, 1], tokenzer: a}",
        ["logging.interval=3", "serving.port=many", "seed"],
        "run",
        [
            f"serve.yaml:1:1: optimizer: is the checkpoint's; {DECIDES}",
            f"serve.yaml:2:1: name: is the checkpoint's; {DECIDES}",
            "serve.yaml:3:11: serving.prt: unknown key, did you mean 'port'?",
            f"serve.yaml:4:8: data.split: is the checkpoint's; {DECIDES}",
            "serve.yaml:4:26: data.tokenzer: unknown key, did you mean 'tokenizer'?",
            f"override 'logging.interval=3': logging: is the checkpoint's; {DECIDES}",
            "override 'serving.port=many': serving.port: 'many' is not an integer",
            "override 'seed': must look like key.path=value",
        ],
    ),
    "a run's own config": (
        "name: run\nmodel: {num_layers: 8}\ntraining: {train_iters: 3}\nlogging: {}\nserving: {port: 1}",
        [],
        "run",
        [f"serve.yaml:2:1: model: this is the config of a run. Name the run by --model; {DECIDES}"],
    ),
    "data, whole": (
        "data: 3",
        ["data={sequence_length: 3}"],
        "run",
        [
            "serve.yaml:1:1: data: 3 is not a mapping",
            f"override 'data={{sequence_length: 3}}': data.sequence_length: is the checkpoint's; {DECIDES}",
        ],
    ),
    "the chat template": (
        "data: {chat_template: a.jinja}",
        [],
        "run",
        ["serve.yaml:1:8: data.chat_template: is serving.chat_template here"],
    ),
    "an unknown section": (
        "servng: {port: 1}",
        [],
        "run",
        ["serve.yaml:1:1: servng: unknown key, did you mean 'serving'?"],
    ),
    "what does not fit the model": (
        "inference:\n  exit: {exits: [2, 3]}",
        [],
        "run",
        ["serve.yaml:2:21: inference.exit.exits.1: there is no exit after layer 3, only after [2, 5]"],
    ),
    "no model": (
        "serving:\n  port: 1",
        [],
        None,
        [
            "serve.yaml:1:1: serving.model: which model? Give a run folder, a step folder or a Hugging Face folder, "
            "here or by --model"
        ],
    ),
    "no model and no file": (
        None,
        ["serving.port=1"],
        None,
        ["--model: which model? Give a run folder, a step folder or a Hugging Face folder, here or by --model"],
    ),
    "no model, because it is mistyped": (
        "serving: {modl: run}",
        ["sed=1"],
        None,
        [
            "serve.yaml:1:11: serving.modl: unknown key, did you mean 'model'?",
            "override 'sed=1': sed: unknown key, did you mean 'seed'?",
        ],
    ),
    "a model that is no text": (
        "serving: {model: 3}",
        [],
        None,
        ["serve.yaml:1:11: serving.model: 3 must be a non-empty string or null"],
    ),
    "a model of a file that is not there": (
        "seed: 1\nserving:\n  model: nowhere",
        [],
        None,
        ["serve.yaml:3:3: serving.model: nowhere is not a folder"],
    ),
    "a model of an override that is not there": (
        "seed: 1",
        ["serving.model=nowhere"],
        None,
        ["override 'serving.model=nowhere': serving.model: nowhere is not a folder"],
    ),
    "a model of the flag that is not there": (None, [], "nowhere", ["--model: nowhere is not a folder"]),
}


@pytest.mark.parametrize(("file", "overrides", "model", "expected"), MESSAGES.values(), ids=MESSAGES)
def test_messages(
    here: Path, file: str | None, overrides: Sequence[str], model: str | None, expected: Sequence[str]
) -> None:
    assert _message(file, *overrides, model=model) == list(expected)


def test_a_file_that_is_not_there_is_named(here: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"^none\.yaml: No such file"),
        open_serving_config(Path("none.yaml"), [], model=Path("run")),
    ):
        pass


def test_what_is_found_out_later_has_its_place(here: Path) -> None:
    Path("serve.yaml").write_text("serving:\n  keys: keys.yaml")
    with (
        pytest.raises(ConfigError, match=r"^serve\.yaml:2:3: serving\.keys: gone$"),
        open_serving_config(Path("serve.yaml"), [], model=Path("run")),
    ):
        raise FieldError("serving.keys", "gone")


def test_what_is_not_installed_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert _message(None) == ["a server needs uvicorn: pip install 'megatron-ee[serve]'"]


LINES = st.sampled_from(
    [
        ("serving.port", st.integers(-2, 2**17)),
        ("serving.timeout", st.floats(-1, 1e6)),
        ("serving.keys", st.none() | st.text("ab:{ ", max_size=3)),
        ("serving.bounds.modes", st.none() | st.lists(st.sampled_from(["full", "early_exit", "fast"]), max_size=2)),
        ("serving.bounds", st.just({"new_tokens": 3})),
        ("inference.exit.thresholds", st.dictionaries(st.sampled_from([2, 5, 6]), st.floats(0, 1), max_size=2)),
        ("inference.sampling.stop", st.lists(st.text("a'\"\n", max_size=2), max_size=2)),
        ("data.tokenizer", st.just("bytes")),
        ("data.split", st.just([1, 1, 1])),
        ("training.train_iters", st.just(3)),
        ("device", st.sampled_from(["cpu", "gpu"])),
        ("seed", st.booleans() | st.integers(0, 9)),
        ("sed", st.integers()),
    ]
).flatmap(lambda line: st.tuples(st.just(line[0]), line[1]))


def _nested(path: str, value: Any) -> Any:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _outcome(file: str | None, *overrides: str) -> Config | list[str]:
    """The config, or what is said, without the place."""
    try:
        return _open(file, *overrides)[1]
    except UserError as error:
        in_file, in_override = (
            re.compile(r"serve\.yaml:\d+:\d+: "),
            [f"override {override!r}: " for override in overrides],
        )
        lines = [in_file.sub("", line, count=1) for line in str(error).splitlines()]
        return [line.removeprefix(place) for line in lines for place in in_override or [""]]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(line=LINES)
def test_an_override_is_the_same_line_of_the_file(here: Path, line: tuple[str, Any]) -> None:
    path, value = line
    written = to_text(_nested(path, value))
    spelled = to_text({"value": value}).removeprefix("value:")
    in_override = _outcome(None, f"{path}={spelled}")
    in_file = _outcome(written)
    assert in_file == in_override


def test_the_configs_of_this_repository_fit_a_checkpoint(here: Path) -> None:
    """The demo's, and one for production, whose paths are for its user to choose."""
    trained = load_config(ROOT / "configs/train/demo.yaml")
    for name in ("demo", "my-model"):
        step = _write_run(Path("runs") / name)
        (step / "config.yaml").write_text(to_yaml(trained))
    files = sorted((ROOT / "configs/serve").glob("*.yaml"))
    assert [file.stem for file in files] == ["demo", "production"]
    for file, name in zip(files, ("demo", "my-model"), strict=True):
        with open_serving_config(file, [], model=None) as (folder, config):
            assert folder == Path("runs") / name / "checkpoints/step_00000007"
            assert config.serving != trained.serving
    assert config.serving.keys and config.serving.audit and config.serving.shadow == 0.01


def test_it_is_read_without_torch(here: Path) -> None:
    code = "import sys; import megatron_ee.server.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
