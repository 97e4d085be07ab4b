"""Reading, merging and overriding config files. What is said of wrong fields is in test_golden_errors.py."""

from pathlib import Path

import pytest

from megatron_ee.config import Config, ConfigError, load_config, open_config, to_yaml
from megatron_ee.errors import FieldError, UserError

GOOD = """\
name: run
model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4}
training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # problems then begin with a bare file name


def load(text: str | bytes, *overrides: str) -> Config:
    Path("a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config("a.yaml", overrides)


def problems(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a.yaml: empty, but a config is a mapping"),
        ("# nothing\n---\n", "a.yaml: empty, but a config is a mapping"),
        ("\n- 1\n", "a.yaml:2:1: [1] is not a mapping, but a config is"),
        ("name", "a.yaml:1:1: 'name' is not a mapping, but a config is"),
        ("a: {b\n", "a.yaml:2:1: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'"),
        ("a: b: c", "a.yaml:1:5: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "a.yaml:2:1: expected a single document in the stream, but found another document"),
        ("a: *b", "a.yaml:1:4: found undefined alias 'b'"),
        ("a: &b [*b]", "a.yaml:1:8: an alias inside of what it stands for"),
        ("a: !!int 3", "a.yaml:1:4: the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("a: !new {b: 1}", "a.yaml:1:4: the tag '!new' is not allowed"),
        ("a: 1\nbc\x07: 2", "a.yaml:2:3: the character '\\x07' is not allowed"),
        ("a: " + "[" * 3000, "a.yaml:1:1: nested too deeply"),
        (b"a: \xff", "a.yaml: not UTF-8 at byte 3"),
    ],
)
def test_a_file_that_is_no_config_gets_one_clear_line(text: str | bytes, expected: str) -> None:
    assert problems(text) == [expected]


def test_keys_are_names_or_whole_numbers() -> None:
    lines = problems(GOOD + "true: 1\n1.5: 1\n[a]: 1\n? {a: b}\n: 1\n")
    assert lines == [
        f"a.yaml:{place}: a key must be a name or a whole number" for place in ("4:1", "5:1", "6:1", "7:3")
    ]


def test_an_escape_beyond_unicode_is_explained() -> None:
    (line,) = problems('a: "\\UFFFFFFFF"')
    assert line.startswith("a.yaml:1:1: ")


@pytest.mark.parametrize(("path", "reason"), [("no.yaml", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(path: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.problems == [f"{path}: {reason}"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        ("2E+3", 2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+1.5e-2", 0.015),
        ("2", 2.0),
        ("1_0", 10.0),
    ],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    lr = load(GOOD + f"optimizer: {{lr: {text}}}").optimizer.lr
    assert lr == value
    assert type(lr) is float


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "True", "2024-01-02", "1:30", "0x10", "<<", ".inf", "1e"])
def test_everything_else_stays_a_string(text: str) -> None:
    assert load(GOOD + f"runs: {text}").runs == text


def test_aliases_repeat_a_value() -> None:
    config = load(GOOD + "exits: {layers: &all [2, 4]}\ninference: {exit: {exits: *all}}")
    assert config.exits.layers == config.inference.exit.exits == (2, 4)


def test_a_base_lies_under_the_file() -> None:
    Path("bases").mkdir()
    Path("bases/b.yaml").write_text(GOOD + "exits: {layers: [2, 4], weights: [1, 1]}\noptimizer: {lr: 1, beta1: 0}\n")
    config = load("base: bases/b.yaml\nname: child\nexits: {layers: [6], weights: [1]}\noptimizer: {beta1: 0.5}")
    assert (config.name, config.exits.layers, config.model.num_layers) == ("child", (6,), 8)
    assert (config.optimizer.lr, config.optimizer.beta1) == (1.0, 0.5)
    assert "base" not in to_yaml(config)


def test_problems_point_into_the_file_that_holds_them() -> None:
    Path("b.yaml").write_text(GOOD + "parallel:\n  layout: [{layers: 8, exits: 1}]\noptimizer: {lr: 0}\n")
    assert problems("base: b.yaml\nseed: x\nparallel: {layout: [{}]}\n", "name=") == [
        "a.yaml:2:1: seed: 'x' is not an integer",
        "a.yaml:3:21: parallel.layout.0.layers: required, but missing",
        "b.yaml:6:13: optimizer.lr: 0 must be a positive number",
        "override 'name=': name: null is not a string",
    ]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("no.yaml", "a.yaml:1:1: base: no.yaml: No such file or directory"),
        ("a.yaml", "a.yaml:1:1: base: a.yaml has a base of its own, but only one parent is allowed"),
        ("empty.yaml", "a.yaml:1:1: base: empty.yaml: empty, but a config is a mapping"),
        ("3", "a.yaml:1:1: base: 3 is not a string"),
        ('"\\0"', "a.yaml:1:1: base: '\\x00': embedded null byte"),
    ],
)
def test_a_base_that_is_none_is_explained(base: str, expected: str) -> None:
    Path("empty.yaml").touch()
    assert problems(f"base: {base}\n" + GOOD) == [expected]


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    config = load(
        GOOD + "exits: {layers: [2]}\ninference: {exit: {exits: [2], thresholds: {2: 0.5}}}",
        "optimizer.lr=3e-4",
        "exits.layers=[2,4]",
        "parallel.layout=auto",
        "inference.exit.thresholds.4=0.8",
        "inference.exit.exits=",
        "data.dataset=a=b",
        "seed=1",
        "seed=2",
        "logging={interval: 7}",
    )
    assert config.optimizer.lr == 3e-4
    assert (config.exits.layers, config.parallel.layout, config.inference.exit.exits) == ((2, 4), "auto", None)
    assert config.inference.exit.thresholds == {2: 0.5, 4: 0.8}
    assert (config.data.dataset, config.seed, config.logging.interval) == ("a=b", 2, 7)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layrs=3", "model.num_layrs: unknown key, did you mean 'num_layers'?"),
        ("model.num_layers=x", "model.num_layers: 'x' is not an integer"),
        ("modell.num_layers=3", "modell: unknown key, did you mean 'model'?"),
        ("seed", "must look like key.path=value"),
        ("=3", "must look like key.path=value"),
        ("model..x=3", "must look like key.path=value"),
        ("name.x=3", "name is 'run', not a mapping"),
        ("exits.layers.0=3", "exits.layers is [2], not a mapping"),
        (
            "exits={layers: [2], layers: [3]}",
            "exits.layers: given twice, first at override 'exits={layers: [2], layers: [3]}'",
        ),
        ("seed=!!int 3", "the tag 'tag:yaml.org,2002:int' is not allowed"),
    ],
)
def test_a_wrong_override_is_quoted(override: str, expected: str) -> None:
    assert problems(GOOD + "exits: {layers: [2]}", override) == [f"override {override!r}: {expected}"]


def test_a_section_that_only_an_override_opens_is_placed_there() -> None:
    text = "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith("training"))
    assert problems(text, "training.train_iters=1", "training.micro_batch_size=1") == [
        "override 'training.train_iters=1': training.global_batch_size: required, but missing"
    ]


def test_yaml_is_in_schema_order_with_lists_on_one_line() -> None:
    text = to_yaml(load(GOOD, "exits.layers=[2, 4]", "inference.exit.thresholds={4: 1, 2: 0.5}", "runs='1e5'"))
    assert text.startswith("name: run\nruns: '1e5'\ndevice: auto\nseed: 0\nplugins: []\nmodel:\n  num_layers: 8\n")
    assert "exits:\n  layers: [2, 4]\n  weights: [0.25, 0.5]\n  weight_schedule:\n    shape: linear\n" in text
    assert "    thresholds:\n      4: 1.0\n      2: 0.5\n" in text
    assert text.endswith("  alarms:\n    window: 32\n    exit_rate: 0.5\n    acceptance: 0.5\n    agreement: 0.9\n")


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("optimizer.lr", "a.yaml:2:13: optimizer.lr: no"),
        ("optimizer.backend", "a.yaml:2:1: optimizer.backend: no"),
        ("logging.tensorboard", "a.yaml:1:1: logging.tensorboard: no"),
        ("data.dataset.1.path", "a.yaml:3:52: data.dataset.1.path: no"),
        ("data.folder", "b.yaml:2:8: data.folder: no"),
        ("checkpoint.interval", "override 'checkpoint.interval=3': checkpoint.interval: no"),
        ("checkpoint.resume", "override 'checkpoint.interval=3': checkpoint.resume: no"),
        ("checkpoint", "checkpoint: no"),
        ("--tokenizer", "--tokenizer: no"),
    ],
    ids=[
        "where it is written",
        "its section",
        "nowhere",
        "an entry of a list",
        "in the base",
        "in an override",
        "its section in an override",
        "a section is no field",
        "a flag is no field",
    ],
)
def test_a_field_is_found_wherever_it_is_written(field: str, line: str) -> None:
    Path("b.yaml").write_text("seed: 1\ndata: {folder: elsewhere}\n")
    Path("a.yaml").write_text(
        "base: b.yaml\noptimizer: {lr: 1}\ndata: {dataset: [{path: a, weight: 1}, {weight: 2, path: b}]}\n" + GOOD
    )
    with pytest.raises(UserError) as caught, open_config("a.yaml", ["checkpoint.interval=3"]):
        raise FieldError(field, "no")
    assert str(caught.value) == line
