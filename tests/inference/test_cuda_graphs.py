"""Decoding through graphs, all of it but CUDA's own recording: the same tokens and keys and values as without, padding
that touches nothing, and no more graphs than there are buckets."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from helpers.decoding import decode, full_logits, opened, request
from helpers.models import whole_model
from helpers.recorded import RecordedCapture
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import ExitParams
from megatron_ee.inference import cuda_graphs, depth_walk
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.depth_walk import DepthWalk
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.parallel.mesh import Mesh

EXITS = [2, 5]
WINDOWS = {"sliding_window": 70, "sliding_window_layers": [2, 3, 8], "qk_norm": True, "qkv_bias": True}
KINDS = {"norms": ("norm", {}), "MLP, block, windows": (["mlp", "block"], WINDOWS)}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    head, fields = KINDS[request.param]
    return opened(whole_model(mesh, exits=EXITS, dtype=torch.float64, head=head, model=fields))


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> RecordedCapture:
    """Walks that are made from now on use it, from a bucket's second launch on."""
    capture = RecordedCapture()
    monkeypatch.setattr(cuda_graphs, "PLAIN_LAUNCHES", 1)
    monkeypatch.setattr(depth_walk, "capture_on", lambda *_: capture)
    return capture


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _walk(model: OpenedModel, lengths: Mapping[int, int], *, slots: int = 5, capacity: int = 100) -> DepthWalk:
    """With sequences of these lengths, two or more, by slot, at full depth."""
    walk = DepthWalk(model.runner, model.exits, slots=slots, capacity=capacity, room=capacity)
    for slot, length in lengths.items():
        walk.ledger.open(slot)
        walk.enter({slot: _tokens(length, seed=slot)}, 8)
    return walk


def _graphs_of(walk: DepthWalk) -> cuda_graphs.SegmentGraphs:
    assert walk._graphs is not None
    return walk._graphs


def test_a_cpu_and_split_matrices_have_no_graphs(model: OpenedModel) -> None:
    group = model.stage.tp_group
    assert cuda_graphs.capture_on(torch.device("cpu"), group) is None
    assert _walk(model, {0: 3})._graphs is None

    class OfTwo:
        def size(self) -> int:
            return 2

    assert cuda_graphs.capture_on(torch.device("cuda"), OfTwo()) is None  # type: ignore[arg-type]


@torch.no_grad()
def _thresholds(model: OpenedModel) -> dict[int, float]:
    tokens = _tokens(41, seed=9)
    return {layer: float(full_logits(model.stage, tokens, layer).softmax(-1).amax(-1).median()) for layer in EXITS}


def test_batches_decode_as_without_graphs(
    model: OpenedModel, capture: RecordedCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged, at mixed depths, with every way to provide missing keys and values; longer than the smallest bucket."""
    thresholds = _thresholds(model)

    def run() -> Batch:
        requests = [
            request(
                _tokens(length, seed=length),
                ExitParams.model_validate({"thresholds": thresholds, "kv_policy": policy, "max_pending": 5}),
                max_new_tokens=20,
            )
            for length, policy in ((58, "recompute"), (3, "fill"), (9, "propagate"), (70, "recompute"), (1, "fill"))
        ]
        batch = Batch(model, slots=6, capacity=92, max_pending=8)
        texts.append([[(of.token, of.exit_layer) for of in text] for text in decode(batch, requests)])
        batch.flush(range(5))
        return batch

    texts: list[list[list[tuple[int, int]]]] = []
    through_graphs = run()
    monkeypatch.setattr(depth_walk, "capture_on", lambda *_: None)
    plain = run()
    assert texts[0] == texts[1]
    assert {layer for text in texts[0] for _, layer in text} == {*EXITS, 8}, "the case is to mix depths"
    assert capture.num_recordings >= 4 and capture.num_repeated > 20
    for number in plain.walk.cache.windows:
        for slot in range(5):
            length = plain.walk.ledger.length(slot)
            both = (batch.walk.cache.read(number, slot, length) for batch in (plain, through_graphs))
            for expected_GTD, actual_GTD in zip(*both, strict=True):
                torch.testing.assert_close(actual_GTD, expected_GTD, atol=1e-10, rtol=0)


@pytest.mark.parametrize("slots", [[0, 1, 2], [3, 1, 0], [4], [0]], ids=str)
@torch.inference_mode()
def test_padding_changes_nothing_and_rows_only_their_own_place(
    model: OpenedModel, capture: RecordedCapture, slots: list[int]
) -> None:
    """Three rows are four, of five slots; what padding was computed from before is no number."""
    lengths = dict(zip(range(5), (4, 66, 9, 2, 30), strict=True))
    walk = _walk(model, lengths)
    for _ in range(2):
        walk.enter({slot: [1] for slot in slots}, 8)
    graphs = _graphs_of(walk)
    assert capture.num_recordings == 1
    graphs._x_PH.fill_(torch.nan)
    before = {number: walk.cache.of(number).clone() for number in walk.cache.windows}
    arrival = walk.enter({slot: [2] for slot in slots}, 8)
    assert capture.num_recordings == 1 and capture.num_repeated == 2
    assert bool(arrival.ask(slots).logits.isfinite().all())
    for number in range(1, 9):
        old_G2MD, new_G2MD = (room[0, :, :, : walk.cache.nowhere] for room in (before[number], walk.cache.of(number)))
        for part in range(2):
            changed_M = (old_G2MD != new_G2MD)[:, part].any(-1).any(0)
            written = [walk.blocks.places(slot, range(lengths[slot] + 2, lengths[slot] + 3))[0] for slot in slots]
            assert changed_M.nonzero()[:, 0].tolist() == sorted(written), number
        assert bool(new_G2MD.isfinite().all()), "what is no number stays where nobody reads"
    texts = [[*_tokens(lengths[slot], seed=slot), 1, 1, 2] for slot in slots]
    expected_NV = torch.stack([full_logits(model.stage, tokens, 8)[-1] for tokens in texts])
    torch.testing.assert_close(arrival.ask(slots).logits, expected_NV, atol=1e-10, rtol=0)


@torch.inference_mode()
def test_results_outlive_the_next_launch(model: OpenedModel, capture: RecordedCapture) -> None:
    walk = _walk(model, {0: 3, 1: 5})
    for _ in range(3):
        earlier = walk.enter({0: [1], 1: [2]}, 5)
    kept = [part.clone() for part in (earlier.output_NH, earlier.hidden_NH)]
    walk.enter({0: [3], 1: [4]}, 5)
    assert capture.num_repeated == 3
    for now, then in zip((earlier.output_NH, earlier.hidden_NH), kept, strict=True):
        assert torch.equal(now, then)


@torch.inference_mode()
def test_several_rows_of_a_sequence_are_run_as_they_are(model: OpenedModel, capture: RecordedCapture) -> None:
    walk = _walk(model, {0: 3, 1: 5})
    for _ in range(3):
        walk.enter({0: [1, 2], 1: [3]}, 8)
    assert capture.num_recordings == 0


@torch.inference_mode()
def test_there_are_no_more_graphs_than_buckets(
    model: OpenedModel, capture: RecordedCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = _walk(model, dict.fromkeys(range(5), 2), capacity=140)
    graphs = _graphs_of(walk)

    def grow(slots: Sequence[int], to: int) -> None:
        while walk.ledger.length(slots[0]) < to:
            walk.enter({slot: [1] for slot in slots}, 8)

    grow([0], 139)
    assert graphs.num_graphs == 3, "one row, up to 64, 128 and 140 positions"
    grow([1], 20)
    assert graphs.num_graphs == 4, "the same for one row of any other slot"
    grow([2], 40)
    grow([4], 60)
    assert graphs.num_graphs == capture.num_recordings == 4
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 5)
    for others in ([2, 3], [1, 2, 3], [4, 3, 2, 1]):
        for _ in range(3):
            walk.enter({slot: [1] for slot in others}, 8)
    assert graphs.num_graphs == 5, "that is the limit: others are run as they are"


def test_the_stand_in_repeats_calls_and_no_python() -> None:
    """As CUDA would: a number that Python read is the one of the recording."""
    x, factor, ran = torch.tensor([1.0, 2.0]), [3.0], [0]

    def computation() -> Sequence[torch.Tensor]:
        ran[0] += 1
        halves: Sequence[torch.Tensor] = (x * factor[0]).chunk(2)
        return [halves[0].add_(1), halves[1]]

    again: Callable[[], Sequence[torch.Tensor]] = RecordedCapture()(computation)
    factor[0] = 100.0
    x.copy_(torch.tensor([5.0, 6.0]))
    first, second = again()
    assert (float(first), float(second), ran) == (16.0, 18.0, [2])
