"""Figures per exit, from sums wherever the exit is."""

import math

import pytest
import torch

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.gate_loss import GateSums
from megatron_ee.training.losses import ExitLoss
from megatron_ee.training.observation.metrics import ExitMeter


def _loss(cross_entropy: float, correct: float) -> ExitLoss:
    return ExitLoss(torch.tensor(cross_entropy), torch.tensor(correct))


def test_means_per_token_over_batches_then_from_zero_again(mesh: Mesh) -> None:
    meter = ExitMeter([2, 4], mesh)
    meter.add({2: _loss(6.0, 1.0), 4: _loss(2.0, 2.0)}, num_tokens=2)
    meter.add({2: _loss(3.0, 0.0), 4: _loss(2.5, 1.0)}, num_tokens=1)
    figures = meter.read("train", {2: 0.5, 4: 1.0})
    assert figures == pytest.approx(
        {
            "train/loss": 3.0,
            "train/unmasked_tokens": 3,
            "train/exit_2/loss": 3.0,
            "train/exit_2/ppl": math.exp(3.0),
            "train/exit_2/accuracy": 1 / 3,
            "train/exit_2/weight": 0.5,
            "train/exit_4/loss": 1.5,
            "train/exit_4/ppl": math.exp(1.5),
            "train/exit_4/accuracy": 1.0,
            "train/exit_4/weight": 1.0,
        }
    )
    meter.add({2: _loss(1.0, 0.0), 4: _loss(1.0, 0.0)}, num_tokens=1)
    assert meter.read("train", {2: 0.5, 4: 1.0})["train/exit_4/loss"] == 1.0


def test_without_a_batch_there_is_no_loss(mesh: Mesh) -> None:
    """A loss of 0.0 would be taken for one."""
    assert ExitMeter([2], mesh).read("train", {2: 1.0}) == {"train/unmasked_tokens": 0.0}


def test_a_batch_without_tokens_is_no_division_by_zero(mesh: Mesh) -> None:
    meter = ExitMeter([2], mesh)
    meter.add({2: _loss(0.0, 0.0)}, num_tokens=0)
    assert meter.read("train", {2: 1.0})["train/exit_2/loss"] == 0.0


def test_an_exit_has_means_of_the_batches_in_which_it_ran(mesh: Mesh) -> None:
    meter = ExitMeter([2, 3, 4], mesh)
    meter.add({2: _loss(6.0, 1.0), 4: _loss(2.0, 2.0)}, num_tokens=2, measured=[2, 4])
    meter.add({4: _loss(2.5, 1.0)}, num_tokens=1, measured={4: 1.0})
    again = ExitMeter([2, 3, 4], mesh)
    again.load_state(meter.state())
    assert again.means() == meter.means() == {2: 3.0, 4: 1.5}
    figures = meter.read("train", {4: 1.0})
    assert figures == again.read("train", {4: 1.0})
    assert figures["train/exit_2/loss"] == 3.0, "of two tokens, not of three"
    assert [figures[f"train/exit_{layer}/weight"] for layer in (2, 3, 4)] == [0.0, 0.0, 1.0]
    assert "train/exit_3/loss" not in figures
    assert figures["train/loss"] == 1.5
    meter.add({4: _loss(1.0, 0.0)}, num_tokens=1, measured=[4])
    assert meter.means() == {4: 1.0}, "from zero again"


def test_there_is_no_weighted_loss_where_one_of_its_parts_was_not_measured(mesh: Mesh) -> None:
    meter = ExitMeter([2, 4], mesh)
    meter.add({4: _loss(2.0, 2.0)}, num_tokens=2, measured=[4])
    assert "train/loss" not in meter.read("train", {2: 0.5, 4: 0.5})


def test_gates_have_means_of_their_own_and_no_part_in_the_loss(mesh: Mesh) -> None:
    meter = ExitMeter([2, 4], mesh, gated=[2])
    sums = GateSums(*map(torch.tensor, (1.0, 3.0, 2.0)))
    meter.add({2: _loss(4.0, 1.0)._replace(gate=sums), 4: _loss(4.0, 2.0)}, num_tokens=4)
    again = ExitMeter([2, 4], mesh, gated=[2])
    again.load_state(meter.state())
    figures = again.read("val", {2: 0.5, 4: 1.0})
    of_gates = {name: value for name, value in figures.items() if "gate" in name}
    assert of_gates == {"val/exit_2/gate_loss": 0.25, "val/exit_2/gate_accuracy": 0.75, "val/exit_2/gate_mean": 0.5}
    assert figures["val/loss"] == 1.5
