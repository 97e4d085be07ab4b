"""The tool that holds measures of confidence against each other: its arithmetic, and a whole run on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.confidences import said_at_exits
from helpers.decoding import opened
from helpers.models import whole_model
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset

from megatron_ee.errors import UserError
from megatron_ee.parallel.mesh import Mesh

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import exit_observations  # noqa: E402
from compare_measures import against_the_text, pictures_of  # noqa: E402
from exit_curves import curve_of, depths_between, reliability_of, without_cost  # noqa: E402


def test_a_curve_by_hand() -> None:
    """Four tokens, exits after 2 and 4 of 8 layers: three thresholds change something."""
    confidences_EN = np.array([[0.9, 0.6, 0.2, 0.2], [0.1, 0.9, 0.6, 0.2]])
    agrees_EN = np.array([[True, False, True, False], [True, True, True, False]])
    curve = curve_of(confidences_EN, agrees_EN, [2, 4], 8)
    points = {
        round(float(depth), 3): float(agreement)
        for depth, agreement in zip(curve.mean_depth, curve.agreement, strict=True)
    }
    assert points[2.0] == 0.5, "all leave at once"
    assert points[(2 + 2 + 4 + 8) / 4] == 0.75, "at 0.6"
    assert points[(2 + 4 + 8 + 8) / 4] == 1.0, "at 0.9, token 1 at the second exit"
    assert points[8.0] == 1.0, "1.0 never exits"
    assert list(curve.mean_depth) == sorted(curve.mean_depth)
    assert curve.at([2.0, 3.0, 8.0]) == pytest.approx([0.5, 0.5 + (3 - 2) / (4 - 2) * 0.25, 1.0])


def test_a_confidence_of_one_never_exits_at_threshold_one() -> None:
    ones_EN = np.ones((1, 3))
    curve = curve_of(ones_EN, np.zeros((1, 3), dtype=bool), [2], 8)
    assert (curve.mean_depth[0], curve.agreement[0]) == (2.0, 0.0)
    assert (curve.mean_depth[-1], curve.agreement[-1]) == (8.0, 1.0)


def test_reliability_by_hand() -> None:
    confidences_N = np.array([0.05, 0.05, 0.95, 0.91, 1.0])
    right_N = np.array([False, True, True, True, False])
    counts, confidence, right, error = reliability_of(confidences_N, right_N)
    assert counts == [2, 3]
    assert confidence == pytest.approx([0.05, (0.95 + 0.91 + 1.0) / 3])
    assert right == pytest.approx([0.5, 2 / 3])
    assert error == pytest.approx((2 * 0.45 + 3 * abs((0.95 + 0.91 + 1.0) / 3 - 2 / 3)) / 5)
    sure_N = np.random.default_rng(0).random(200_000)
    assert reliability_of(sure_N, np.random.default_rng(1).random(200_000) < sure_N).error < 0.01


def test_a_hugging_face_folder_is_left_as_it_is(tmp_path: Path) -> None:
    assert pictures_of(tmp_path / "run/checkpoints/step_00000001") == tmp_path / "run/pictures"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="say where the figures go: --output"):
        pictures_of(tmp_path)


def test_what_a_gate_says_stands_for_a_probability() -> None:
    right = np.array([0.1, 0.5, 0.9])
    says = right / (right + 3 * (1 - right))
    np.testing.assert_allclose(without_cost(says, 3.0), right)
    assert depths_between(3, 12, 4) == [3.0, 6.0, 9.0, 12.0]


def test_what_exits_are_seen_to_say(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of batches and of rows that don't come out even."""
    monkeypatch.setattr(exit_observations, "_BATCH", 2)
    monkeypatch.setattr(exit_observations, "_ROWS", 7)
    exits = [2, 4, 6]
    stage = whole_model(mesh, exits=exits, head=["norm", "mlp", "block"], gate=["none", "linear", "mlp"])
    windows_BS = np.random.default_rng(0).integers(64, size=(3, 6))
    observed = exit_observations.observe(opened(stage), windows_BS)
    said = [said_at_exits(stage, window_S[:-1].tolist(), exits) for window_S in windows_BS]
    # position after position within a batch of two windows, then the one that is left
    order = [(window, position) for pair in ((0, 1), (2,)) for position in range(5) for window in pair]
    asked = exit_observations.exits_asked(opened(stage))
    assert asked == {**dict.fromkeys(["max_probability", "margin", "entropy", "cosine"], exits), "gate": [4, 6]}
    for name, layers in asked.items():
        expected_EN = [[said[window][layer].confidence(name, at) for window, at in order] for layer in layers]
        np.testing.assert_allclose(observed.confidences_EN[name], expected_EN, atol=1e-5, err_msg=name)
    choices_EN = np.array([[said[window][layer].choice(at) for window, at in order] for layer in (*exits, 8)])
    np.testing.assert_array_equal(observed.agrees_EN, choices_EN[:-1] == choices_EN[-1])
    labels_N = [windows_BS[window, at + 1] for window, at in order]
    np.testing.assert_array_equal(observed.correct_EN, choices_EN[:-1] == np.array(labels_N))
    np.testing.assert_array_equal(observed.final_correct_N, choices_EN[-1] == np.array(labels_N))


def test_who_alone_is_right_by_hand() -> None:
    correct_EN, final_N = np.array([[True, True, False, False, False]]), np.array([True, False, True, True, False])
    observed = exit_observations.Observed({}, correct_EN == final_N, correct_EN, final_N)
    assert against_the_text(observed, [2]) == {"2": {"only_exit": 0.2, "only_final": 0.4}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """The folder of runs of two models, one with gates."""
    folder = tmp_path_factory.mktemp("measures")
    write_small_dataset(folder)
    for name, gate in (("gated", ["none", "linear"]), ("bare", "none")):
        exits: dict[str, Any] = {"layers": [2, 5], "gate": gate, "gate_loss": {"target": "final"}}
        training = {"train_iters": 3}
        config = run_config(folder, name=name, exits=exits, training=training, data={"split": [0.7, 0.3, 0.0]})
        ranks.run(1, train_and_save, config)
    return folder


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "compare_measures.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_model_with_gates_is_compared(trained: Path) -> None:
    done = _tool(trained / "runs/gated", "--sequences", 20)
    assert done.returncode == 0, done.stderr
    names = ["max_probability", "margin", "entropy", "cosine", "gate"]
    assert "".join(f"{name:>18}" for name in names) in done.stdout
    assert "gate of exit 5, cost 2 taken out: calibration error" in done.stdout
    pictures = trained / "runs/gated/pictures"
    content = json.loads((pictures / "measures.json").read_text())
    assert content["tokens"] == 20 * 16
    assert content["gates"].keys() == {"5"}
    assert "exit 2 alone is right about the text on " in done.stdout
    assert content["against_the_text"].keys() == {"2", "5"}
    assert sum(content["gates"]["5"]["counts"]) == 320
    at_depth = content["at_mean_depth"]
    assert (at_depth["depth"][0], at_depth["depth"][-1]) == (5.0, 8.0)
    assert [at_depth[name][-1] for name in names] == [1.0] * len(names)
    assert (pictures / "measures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_model_without_gates_and_a_text_of_ones_own(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("early exits let a token leave when settled " * 5)
    done = _tool(trained / "runs/bare", "--text", text, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["curves"].keys() == {"max_probability", "margin", "entropy", "cosine"} and not content["gates"]
    assert content["tokens"] == 16 * ((len(text.read_text()) - 1) // 16)
    text.write_text("short")
    done = _tool(trained / "runs/bare", "--text", text)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "5 tokens of text make no sequence of 16" in done.stderr
