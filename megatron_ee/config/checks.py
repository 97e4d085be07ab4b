"""Rules between fields: each is a generator of (path, message) pairs."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megatron_ee.config.checks_decoding import stage_problems
from megatron_ee.config.checks_exits import exit_problems
from megatron_ee.config.checks_layout import layout_problems
from megatron_ee.config.checks_model import length_problems
from megatron_ee.config.checks_optimizer import optimizer_problems
from megatron_ee.config.checks_serving import serving_problems
from megatron_ee.config.checks_tuning import tuning_problems
from megatron_ee.errors import did_you_mean

if TYPE_CHECKING:
    from megatron_ee.config.schema import Config

Problems = Iterator[tuple[str, str]]

# Names that need no plug-in, by the field that chooses among them.
BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "parallel.schedule": ("1f1b", "gpipe", "interleaved", "filled-1f1b", "zero-bubble", "megatron"),
    "optimizer.backend": ("megatron", "torch", "deepspeed", "apex", "transformer_engine"),
    "optimizer.lr_decay": ("cosine", "linear", "wsd", "constant"),
    "inference.exit.measure": ("max_probability", "margin", "entropy", "cosine", "gate"),
}


class InvalidFieldsError(ValueError):
    """What is wrong between several fields: (path, message) pairs, so that the loader can point at each of them."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))


def problems_of(config: "Config") -> Problems:
    """All that is wrong between the fields of a config whose fields are right by themselves."""
    yield from exit_problems(config)
    yield from _split_problems(config)
    yield from _schedule_problems(config)
    yield from layout_problems(config)
    yield from length_problems(config)
    yield from _data_problems(config)
    yield from _training_problems(config)
    yield from optimizer_problems(config)
    yield from tuning_problems(config)
    yield from stage_problems(config.inference.parallel, config.model.num_layers)
    yield from serving_problems(config)
    yield from _name_problems(config)


def _split_problems(config: "Config") -> Problems:
    model, ranks = config.model, config.parallel.tensor
    sizes = {"num_attention_heads": model.num_attention_heads, "ffn_hidden_size": model.ffn_hidden_size}
    if model.num_key_value_heads != model.num_attention_heads:
        sizes["num_key_value_heads"] = model.num_key_value_heads
    if model.vocab_size != "auto":
        sizes["vocab_size"] = model.vocab_size
    wrong = {name: size for name, size in sizes.items() if size % ranks}
    for name, size in wrong.items():
        yield f"model.{name}", f"{size} doesn't divide over parallel.tensor = {ranks} ranks"
    if not wrong and model.vocab_size == "auto" and 64 % ranks:
        yield "model.vocab_size", f"auto, a multiple of 64, may not divide over parallel.tensor = {ranks} ranks: set it"
    if config.parallel.sequence and ranks == 1:
        yield "parallel.sequence", "true needs parallel.tensor of at least 2, not 1"
    if config.parallel.sequence and config.data.sequence_length % ranks:
        length = config.data.sequence_length
        yield "data.sequence_length", f"{length} doesn't divide over parallel.tensor = {ranks} ranks"


def _schedule_problems(config: "Config") -> Problems:
    parallel = config.parallel
    if parallel.schedule == "interleaved" and (parallel.chunks < 2 or parallel.pipeline < 2):
        yield (
            "parallel.schedule",
            f"interleaved needs pipeline and chunks of at least 2, not {parallel.pipeline} and {parallel.chunks}",
        )
    if parallel.chunks > 1 and parallel.schedule in ("1f1b", "gpipe", "filled-1f1b", "zero-bubble"):
        yield "parallel.chunks", f"{parallel.chunks} chunks need schedule interleaved, not {parallel.schedule}"
    if parallel.schedule == "megatron" and parallel.chunks > 1 and parallel.pipeline < 2:
        yield "parallel.chunks", f"{parallel.chunks} chunks need pipeline of at least 2, not {parallel.pipeline}"
    if parallel.schedule == "filled-1f1b" and parallel.pipeline < 2:
        yield "parallel.schedule", "filled-1f1b needs pipeline of at least 2, not 1: one stage is never idle"
    if parallel.schedule == "zero-bubble" and parallel.pipeline < 2:
        yield "parallel.schedule", "zero-bubble needs pipeline of at least 2, not 1: one stage waits for no gradient"
    if config.exits.release and parallel.schedule == "megatron":
        yield "exits.release", "true is what schedule megatron always does; leave it out"
    if config.logging.trace_iterations and parallel.schedule == "megatron":
        yield "logging.trace_iterations", "schedule megatron shows no actions to trace"


def _data_problems(config: "Config") -> Problems:
    data = config.data
    if data.format == "documents":
        if data.validation is not None:
            yield (
                "data.validation",
                "needs data.format messages: of documents, data.split says which are for validation",
            )
        for name, default in (("chat_template", "default"), ("packing", True)):
            value = getattr(data, name)
            if value != default:
                yield f"data.{name}", f"{json.dumps(value)} needs data.format messages, not documents"
        return
    for name, path in (("dataset", data.dataset), ("validation", data.validation)):
        if isinstance(path, tuple):
            yield f"data.{name}", "format messages takes one .jsonl, not a list"
        elif path is not None and not path.removesuffix(".gz").endswith((".jsonl", ".json")):
            yield f"data.{name}", f"{path!r} must be a .jsonl or .jsonl.gz of conversations for format messages"


def _training_problems(config: "Config") -> Problems:
    batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    ranks, stages = 1 if config.parallel.data == "auto" else config.parallel.data, config.parallel.pipeline
    num_microbatches, left_over = divmod(batch, micro_batch * ranks)
    if left_over:
        across = f" x parallel.data = {micro_batch} x {ranks}" if ranks > 1 else f" = {micro_batch}"
        yield "training.global_batch_size", f"{batch} must be a multiple of micro_batch_size{across}"
    elif config.parallel.goes_in_rounds and num_microbatches % stages:
        yield (
            "training.global_batch_size",
            f"makes {num_microbatches} micro-batches a step, but schedule {config.parallel.schedule} needs a multiple "
            f"of the {stages} stages",
        )
    for number, iteration in enumerate(config.logging.trace_iterations):
        if iteration > config.training.train_iters:
            last = config.training.train_iters
            yield f"logging.trace_iterations.{number}", f"{iteration} is beyond training.train_iters = {last}"
    profile = config.logging.profile
    if profile is not None and profile.all[-1] > config.training.train_iters:
        yield (
            "logging.profile",
            f"ends with {profile.all[-1]}, beyond training.train_iters = {config.training.train_iters}",
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        yield "optimizer.min_lr", f"{config.optimizer.min_lr} must be at most lr = {config.optimizer.lr}"
    if config.optimizer.lr_decay == "wsd":
        iters = config.optimizer.lr_warmup_iters + config.optimizer.lr_cooldown_iters
        if not config.optimizer.lr_cooldown_iters > 0 or iters > config.training.train_iters:
            yield (
                "optimizer.lr_cooldown_iters",
                f"{config.optimizer.lr_cooldown_iters} must be positive and fit, with the warm-up, "
                f"into train_iters = {config.training.train_iters}",
            )


def _name_problems(config: "Config") -> Problems:
    """Names that are no built-in's. A plug-in may know them: then it is asked once it has been loaded."""
    if config.plugins:
        return
    chosen = {
        "parallel.schedule": config.parallel.schedule,
        "optimizer.backend": config.optimizer.backend,
        "optimizer.lr_decay": config.optimizer.lr_decay,
        "inference.exit.measure": config.inference.exit.measure,
    }
    for path, name in chosen.items():
        names = BUILT_IN[path]
        if (path, name) == ("parallel.schedule", "deepspeed"):
            yield path, "DeepSpeed's pipeline runs models of its own, without exits: it is an optimizer.backend alone"
        elif name not in names:
            yield path, f"{name!r} must be {', '.join(map(repr, names))} or a plug-in's{did_you_mean(name, names)}"
