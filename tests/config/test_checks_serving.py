"""A config's own settings beside the bounds that it sets for requests."""

from pathlib import Path

import pytest

from megatron_ee.config import Config, ConfigError, load_config, to_yaml

RUN = """\
name: run
model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4}
training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}
exits: {layers: [2, 4]}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(RUN + text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "inference: {exit: {threshold: 0.5}}\nserving: {bounds: {threshold: 0.8, measures: [max_probability]}}",
            ":5:20: inference.exit.threshold: 0.5 is below serving.bounds.threshold = 0.8",
        ),
        (
            "inference: {exit: {thresholds: {4: 0.5}}}\nserving: {bounds: {threshold: 0.8, measures: [margin, "
            "max_probability]}}",
            ":5:33: inference.exit.thresholds.4: 0.5 is below serving.bounds.threshold = 0.8",
        ),
        (
            "serving: {bounds: {threshold: 0.8}}",
            ":5:11: serving.bounds.measures: null, but a threshold of 0.8 is another limit for each measure: name "
            "those that may be asked for, as [max_probability]",
        ),
        (
            "serving: {bounds: {new_tokens: 64}}",
            ": inference.sampling.max_new_tokens: 128 is above serving.bounds.new_tokens = 64",
        ),
        (
            "serving: {bounds: {min_exit: 3}}",
            ": inference.exit.min_exit: 0 is below serving.bounds.min_exit = 3",
        ),
        (
            "inference: {sampling: {logit_bias: {7: -1000.0}}}\nserving: {bounds: {stops: 3}}",
            ":5:37: inference.sampling.logit_bias.7: -1000 is not between -100 and 100",
        ),
    ],
)
def test_what_no_request_could_fall_back_on(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    (line,) = str(error.value).splitlines()
    assert line.startswith(str(tmp_path / "run.yaml")) and line.endswith(message)


def test_an_override_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^override 'inference.exit.threshold=0.2': inference.exit.threshold: 0.2 is"
    ):
        load(
            tmp_path,
            "serving: {bounds: {threshold: 0.8, measures: [max_probability]}}",
            "inference.exit.threshold=0.2",
        )


def test_a_config_that_says_nothing_of_requests_is_not_held_to_their_bounds(tmp_path: Path) -> None:
    config = load(tmp_path, "inference: {sampling: {max_new_tokens: 5000}, exit: {max_pending: 2, draft_length: 2}}")
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
