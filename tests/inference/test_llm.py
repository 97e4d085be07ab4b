"""The Python interface, on a model of Hugging Face's and on a run of ours."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.huggingface import save_model
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset
from helpers.tokenizers import write_bpe_folder, write_llama3_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import megatron_ee
from megatron_ee import LLM, ExitParams, SamplingParams
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.command import Session
from megatron_ee.inference.completion import Piece, completions, in_order
from megatron_ee.inference.request import Emission, Request
from megatron_ee.parallel.mesh import Mesh

VOCAB_SIZE = 322
POSITIONS = 48
PROMPTS: list[Any] = ["early exits", [5, 80, 200, 7, 31], "a token leaves when it is settled, while", "let"]
FIRST, MIXED = ExitParams(threshold=0.0), ExitParams(threshold=0.06)
FULL = ExitParams(mode="full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose exits share its norm, with Llama 3's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("llm") / "llama"
    fields = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": POSITIONS, "eos_token_id": 321}
    save_model(folder, "Llama", initializer_range=0.3, **fields)
    return write_llama3_tokenizer(folder)


@pytest.fixture(scope="module")
def llm(folder: Path, mesh: Mesh) -> LLM:
    return _open(folder)


def _open(folder: Path, *overrides: str) -> LLM:
    return LLM(folder, overrides=["exits.layers=all", "exits.norm=shared", *overrides], device="cpu")


def _sampling(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True, **fields})


def test_prompts_of_any_kind_get_the_tokens_that_transformers_generates(llm: LLM, folder: Path) -> None:
    texts = llm.generate(PROMPTS, _sampling(), FULL)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        expected = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        assert list(text.prompt) == expected
        settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        whole = model.generate(torch.tensor([expected]), **settings)
        assert text.tokens == whole[0, len(expected) :].tolist()
        assert (text.finish_reason, text.stop_reason) == ("length", None)
        assert text.exit_layers == [4] * 8 and text.confidences == [1.0] * 8 and text.mean_depth == 4


@pytest.mark.parametrize("exit", [FULL, MIXED, FIRST])
def test_a_prompt_alone_is_as_in_any_batch(llm: LLM, folder: Path, exit: ExitParams) -> None:
    together = llm.generate(PROMPTS, _sampling(), exit)
    by_two = _open(folder, "inference.max_batch_size=2", "inference.prefill_chunk=4")
    for texts in (
        [llm.generate(prompt, _sampling(), exit)[0] for prompt in PROMPTS],
        by_two.generate(PROMPTS, _sampling(), exit),
    ):
        assert [text.text for text in texts] == [text.text for text in together]
        assert [text.exit_layers for text in texts] == [text.exit_layers for text in together]
    if exit is MIXED:
        assert len({layer for text in together for layer in text.exit_layers}) > 1, "the case is to mix depths"


def test_a_free_slot_is_filled_at_once(folder: Path, mesh: Mesh) -> None:
    """Two slots: one text takes eight rounds, and beside it there is room for the other three."""
    llm = _open(folder, "inference.max_batch_size=2")
    llm.generate(PROMPTS, [_sampling(max_new_tokens=count) for count in (8, 3, 3, 2)], FULL)
    assert llm.work.rounds == 8
    assert llm.work.launches == {(0, 4): 8}


@pytest.mark.parametrize("admission", ["answer", "prompt"])
def test_memory_for_few_positions_makes_prompts_wait_and_changes_no_text(
    llm: LLM, folder: Path, mesh: Mesh, admission: str
) -> None:
    keeps = str(admission == "prompt").lower()
    settings = ["positions=40", "block_size=2", f"admission={admission}", f"keep_prefixes={keeps}"]
    small = _open(folder, *(f"inference.kv_cache.{setting}" for setting in settings))
    sampling = SamplingParams(max_new_tokens=20, temperature=0.7)
    prompts = [[1, 2, 3, number] for number in range(6)]
    ours, expected = (of.generate(prompts, sampling) for of in (small, llm))
    assert [completion.tokens for completion in ours] == [completion.tokens for completion in expected]
    with pytest.raises(FieldError, match=r"prompts\.1: 4 \+ 38 new tokens do not fit into 40 positions"):
        small.generate([[1], [1, 2, 3, 4]], SamplingParams(max_new_tokens=38))


def test_each_prompt_has_settings_of_its_own(llm: LLM) -> None:
    sampling = [_sampling(max_new_tokens=3), _sampling(), _sampling(max_new_tokens=1), _sampling()]
    texts = llm.generate(PROMPTS, sampling, [FULL, FIRST, FIRST, FULL])
    assert [text.exit_layers for text in texts] == [[4] * 3, [1] * 8, [1], [4] * 8]


@pytest.mark.parametrize(
    "prompts",
    ["let", ["let"], [70, 71], [[70, 71]], np.array([70, 71]), (70, 71), [np.array([70, 71])]],
    ids=lambda value: type(value).__name__,
)
def test_one_prompt_or_several(llm: LLM, prompts: Any) -> None:
    (text,) = llm.generate(prompts, _sampling())
    assert len(text.tokens) == 8
    assert all(type(token) is int for token in text.prompt)


def test_no_prompts_are_no_texts(llm: LLM) -> None:
    assert llm.generate([]) == [] and list(llm.stream([])) == []


def test_the_config_says_what_a_call_does_not(folder: Path, mesh: Mesh) -> None:
    llm = _open(folder, "inference.sampling={max_new_tokens: 3, ignore_eos: true}", "inference.exit.threshold=0.0")
    (text,) = llm.generate("let")
    assert text.exit_layers == [1, 1, 1]
    assert llm.config.inference.sampling.max_new_tokens == 3


@pytest.mark.parametrize(
    ("prompts", "sampling", "exit", "message"),
    [
        (["let", [1, 322]], None, None, "prompts.1: 322 is none of the tokenizer's tokens, which are 0 to 321"),
        ([[-1]], None, None, "prompts.0: -1 is none"),
        ([["a"]], None, None, "prompts.0: 'a' is none"),
        ([True], None, None, "prompts.0: True is none"),
        (["let", 1.5], None, None, "prompts.1: 1.5 is neither a text nor a list of tokens"),
        (7, None, None, "prompts: 7 is neither"),
        (["let", []], None, None, "prompts.1: no tokens"),
        (["\ud800"], None, None, "prompts.0: half a surrogate pair"),
        (["let", [1] * 49], None, None, "prompts.1: 49 tokens, but the model has 48 positions"),
        (["a", "b"], [SamplingParams()], None, "sampling: 1 for 2 prompts"),
        ("a", {"top_k": 3}, None, "sampling: neither SamplingParams nor a list of these"),
        ("a", None, [SamplingParams()], "exit: neither ExitParams"),
        (["a", "b"], None, [ExitParams(), ExitParams(exits=(7,))], r"no exit after layer 7.* \(prompts.1\)$"),
        (["a", "b"], [SamplingParams(), SamplingParams(stop_token_ids=(322,))], None, r"322.* \(prompts.1\)$"),
        ("a", None, ExitParams(measure="gate"), r"gate.* \(prompts.0\)$"),
        ("a", None, ExitParams(measure="guess"), r"guess.* \(prompts.0\)$"),
    ],
)
def test_what_is_wrong_names_the_prompt_before_anything_is_decoded(
    llm: LLM, prompts: Any, sampling: Any, exit: Any, message: str
) -> None:
    before = llm.work
    for call in (llm.generate, llm.stream):
        with pytest.raises(UserError, match=message):
            call(prompts, sampling, exit)
    assert llm.work == before
    assert len(llm.generate("let", _sampling())[0].tokens) == 8


def test_a_prompt_whose_logits_are_no_numbers_is_named(folder: Path, mesh: Mesh) -> None:
    llm = _open(folder)
    llm.model.stage.embedding.weight[7] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"^prompts\.1: no token can be chosen: the logits there are NaN"):
        llm.generate([[1, 2], [7, 2], [3]], _sampling(), FULL)
    assert len(llm.generate([[1, 2]], _sampling(), FULL)[0].tokens) == 8


def test_prompts_are_scored_as_transformers_would(llm: LLM, folder: Path) -> None:
    scores = llm.score(PROMPTS, top=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, of_prompt in zip(PROMPTS, scores, strict=True):
        tokens = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        with torch.no_grad():
            logprobs_SV = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        assert [of.token for of in of_prompt] == pytest.approx(
            logprobs_SV[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist(), abs=1e-4
        )
        likeliest = logprobs_SV[:-1].topk(3)
        assert [list(of.top) for of in of_prompt] == likeliest.indices.tolist()
    whole = [1] * POSITIONS
    (of_whole,) = llm.score(whole)
    assert len(of_whole) == POSITIONS - 1 and not any(of.top for of in of_whole)
    assert llm.score([]) == [] and llm.score([[5]]) == [()]


def test_what_cannot_be_scored_is_named(llm: LLM, folder: Path, mesh: Mesh) -> None:
    with pytest.raises(FieldError, match="top: -1 is below 0"):
        llm.score("let", top=-1)
    with pytest.raises(FieldError, match=r"prompts\.1: 49 tokens, but the model has 48 positions"):
        llm.score([[1], [1] * 49])
    broken = _open(folder)
    broken.model.stage.embedding.weight[7] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"^prompts\.1: no token can be chosen: the logits there are NaN"):
        broken.score([[1, 2], [7, 2]])
    assert len(broken.score([1, 2])[0]) == 1


def test_texts_end_where_the_models_positions_do(llm: LLM) -> None:
    for length in (POSITIONS, POSITIONS - 3):
        (text,) = llm.generate([[7] * length], _sampling(max_new_tokens=100))
        assert len(text.tokens) == POSITIONS - length + 1  # the last token is nowhere
        assert text.finish_reason == "length"


def test_a_stop_token_ends_a_text_and_is_no_part_of_it(llm: LLM) -> None:
    (whole,) = llm.generate("let", _sampling(), FULL)
    stop = whole.tokens[4]
    count = whole.tokens.index(stop) + 1
    (text,) = llm.generate("let", _sampling(stop_token_ids=(stop,)), FULL)
    assert text.tokens == whole.tokens[:count]
    assert (text.finish_reason, text.stop_reason) == ("stop", stop)
    assert text.text == llm.model.tokenizer.decode([*whole.tokens[: count - 1]])


def test_a_stop_string_ends_a_text_across_tokens_and_is_never_shown(llm: LLM) -> None:
    (whole,) = llm.generate("let", _sampling(max_new_tokens=24), FULL)
    spelled = [llm.model.tokenizer.decode([token]) for token in whole.tokens]
    windows = [whole.text[start : start + 3] for start in range(4, len(whole.text) - 2)]
    stop = next(window for window in windows if not any(window in text for text in spelled) and "\ufffd" not in window)
    sampling = _sampling(max_new_tokens=24, stop=("never said", stop))
    (text,) = llm.generate("let", sampling, FULL)
    assert text.text == whole.text[: whole.text.index(stop)]
    assert text.tokens == whole.tokens[: len(text.tokens)] and len(text.tokens) < 24
    assert (text.finish_reason, text.stop_reason) == ("stop", stop)
    shown = ""
    for piece in llm.stream("let", sampling, FULL):
        shown += piece.text
        assert text.text.startswith(shown)
    late = sampling.model_copy(update={"min_new_tokens": 24})
    assert llm.generate("let", late, FULL)[0].tokens == whole.tokens


def test_a_slot_is_free_when_a_stop_string_has_ended_its_text(folder: Path, mesh: Mesh) -> None:
    llm = _open(folder, "inference.max_batch_size=1")
    (whole,) = llm.generate("let", _sampling(), FULL)
    stopped = _sampling(stop=(whole.text[0],))
    texts = llm.generate(["let", "let"], [stopped, _sampling()], FULL)
    assert [text.text for text in texts] == ["", whole.text]
    assert texts[1].tokens == whole.tokens


def test_a_folders_own_stop_tokens_end_texts(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    copy = tmp_path / "stops"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (whole,) = _open(folder).generate("let", _sampling(), FULL)
    stop = whole.tokens[2]
    (copy / "generation_config.json").write_text(f'{{"eos_token_id": [{stop}, 5000]}}')
    llm = _open(copy)
    assert llm.model.stop_token_ids == (321, stop)  # nobody says 5000
    (text,) = llm.generate("let", SamplingParams(max_new_tokens=8), FULL)
    assert text.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert text.stop_reason == stop
    (copy / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is \"</s>\": neither a token id"):
        _open(copy)


def test_texts_begin_with_bos_and_tokens_are_taken_as_they_are(llm: LLM) -> None:
    begin, tokenizer = (320,), llm.model.tokenizer
    requests = llm.requests(["let", "", [320, 5], "<|begin_of_text|>let"])
    assert [request.prompt for request in requests[:3]] == [(*begin, *tokenizer.encode("let")), begin, (320, 5)]
    assert requests[3].prompt.count(320) == 1  # spelled out, it is text
    assert tokenizer.decode(list(requests[3].prompt)) == "<|begin_of_text|>let"


def test_equal_prompts_get_different_texts_and_a_call_gives_the_same_again(llm: LLM) -> None:
    hot = _sampling(temperature=2.0)
    texts = llm.generate(["let"] * 3, hot)
    assert len({tuple(text.tokens) for text in texts}) == 3
    assert llm.generate(["let"] * 3, hot) == texts
    seeded = llm.generate(["let", "a", "let"], _sampling(temperature=2.0, seed=5))
    assert seeded[0] == seeded[2]


def test_pieces_join_to_the_texts_and_come_in_turns(llm: LLM) -> None:
    pieces = list(llm.stream(PROMPTS, _sampling(), MIXED))
    assert all({piece.index for piece in pieces[start : start + 4]} == {0, 1, 2, 3} for start in range(0, 32, 4))
    texts = llm.generate(PROMPTS, _sampling(), MIXED)
    for index, text in enumerate(texts):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == text.text
        assert tuple(piece.emission for piece in own) == text.emissions
        assert [piece.finish_reason for piece in own] == [None] * 7 + ["length"]


def test_streams_may_be_left_and_may_cross(llm: LLM) -> None:
    (expected,) = llm.generate("let", _sampling(), MIXED)
    left = llm.stream(PROMPTS, _sampling())
    next(left)
    left.close()  # type: ignore[attr-defined]
    one, other = llm.stream("let", _sampling(), MIXED), llm.stream("let", _sampling(), MIXED)
    both = [(first.emission, second.emission) for first, second in zip(one, other, strict=True)]
    assert [first for first, _ in both] == [second for _, second in both] == list(expected.emissions)


def test_a_wrong_line_does_not_end_a_session(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("early exits\n" + "let a token leave " * 20 + "\nlet\n"))
    Session(llm).converse()
    out, err = capsys.readouterr()
    assert out.count(", mean depth ") == 2
    assert re.fullmatch(r"prompts\.0: \d+ tokens, but the model has 48 positions\n", err)


def test_a_run_is_opened_without_bos(tmp_path: Path, mesh: Mesh, ranks: RankPool) -> None:
    """Beside a model that is open already; a run has seen documents, each after the end of another."""
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, training={"train_iters": 1})
    ranks.run(1, train_and_save, config)
    for path in (tmp_path / "runs/tiny", tmp_path / "runs/tiny/checkpoints/step_00000001"):
        llm = LLM(path)
        texts = llm.generate(["early", ""], _sampling(ignore_eos=False), FIRST)
        assert [text.prompt for text in texts] == [tuple(b"early"), (256,)]
        assert llm.model.stop_token_ids == (256,)
        assert {layer for text in texts for layer in text.exit_layers} == {2}


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("nothing", {}, "checkpoint: nothing is not a folder"),
        (None, {"overrides": ["inference.exit.treshold=1"]}, "did you mean 'threshold'"),
        (None, {"overrides": ["exits.layers=[1]"]}, "exits.norm"),
        (None, {"config": "none.yaml"}, "none.yaml: No such file or directory"),
        (None, {"device": "cuda"}, "device: cuda needs a GPU"),
    ],
)
def test_what_cannot_be_opened_says_why(folder: Path, path: str | None, settings: Any, message: str) -> None:
    if "device" in settings and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        LLM(path or folder, **settings)


def test_a_tokenizer_without_bos_writes_none(tmp_path: Path, mesh: Mesh) -> None:
    plain = write_bpe_folder(save_model(tmp_path / "plain", "Qwen2", vocab_size=330, eos_token_id=1), eos_token="!")
    assert _open(plain).requests("let")[0].prompt == tuple(_open(plain).model.tokenizer.encode("let"))


def test_the_package_imports_torch_only_where_it_is_needed() -> None:
    code = (
        "import sys, megatron_ee, megatron_ee.inference.__main__\n"
        "from megatron_ee import LLM, ExitParams, SamplingParams\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        megatron_ee.Nothing  # noqa: B018


def _piece(index: int, number: int, *, ends: bool) -> Piece:
    return Piece(index, f"{index}.{number} ", Emission(number, 1, 1.0), "length" if ends else None)


@given(st.lists(st.integers(1, 4), max_size=5), st.randoms())
def test_pieces_in_order_are_all_pieces_text_after_text(lengths: list[int], random: Any) -> None:
    waiting = {index: list(range(length)) for index, length in enumerate(lengths)}
    pieces = []
    while waiting:
        index = random.choice(sorted(waiting))
        number = waiting[index].pop(0)
        pieces.append(_piece(index, number, ends=not waiting[index]))
        waiting = {index: numbers for index, numbers in waiting.items() if numbers}
    ordered = list(in_order(iter(pieces)))
    assert [piece.text for piece in ordered] == [
        f"{index}.{number} " for index, length in enumerate(lengths) for number in range(length)
    ]
    whole = dict(completions([Request((1,))] * len(lengths), pieces))
    assert [whole[index].tokens for index in range(len(lengths))] == [list(range(length)) for length in lengths]


def test_the_first_text_is_shown_while_others_grow() -> None:
    pieces = [_piece(0, 0, ends=False), _piece(1, 0, ends=True), _piece(0, 1, ends=True)]
    shown = in_order(iter(pieces))
    assert [next(shown).index for _ in range(3)] == [0, 0, 1]


def test_field_errors_stay_what_they_are(llm: LLM) -> None:
    """So that the command can say where a wrong field was written."""
    with pytest.raises(FieldError) as caught:
        llm.generate("a", exit=ExitParams(exits=(7,)))
    assert caught.value.field.startswith("inference.exit.exits")
