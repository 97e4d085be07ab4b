"""What is often said of early exits, one line each, and what the figures say of it."""

from collections.abc import Iterator

import reproduce_measured as measured
from reproduce_results import Results

AGREEING = 0.95


def claims_of(results: Results) -> Iterator[list[str]]:
    """What is said, what was measured, and why larger models may differ."""
    yield ["1.5 to 3 times as fast", *_speed(results)]
    yield ["3 times at batches above 32", *_large_batches(results)]
    yield ["1.8 times on mixed loads", *_mixed(results)]
    yield ["the sweet spot is a threshold of .80 to .90", *_sweet_spot(results)]
    yield ["95 to 99 % of the quality at .95", *_quality(results)]
    yield ["exits belong at a fifth to a third of the depth", *_places(results)]
    yield ["15 % less memory than other speculative methods", *_memory(results)]
    yield ["SLED improves accuracy", *_sled(results)]
    yield ["intermediate layers sometimes beat the last", *_beaten(results)]
    yield ["a frozen model gives unstable exits", *_frozen(results)]
    yield ["about 1,000 iterations of warm-up stabilise", *_warm_up(results)]
    yield ["saves energy", *_energy(results)]


def _speed(results: Results) -> tuple[str, str]:
    decode = results.content["decode"]
    most = measured.most_sequences(decode)
    alone, many = (measured.fastest_exit(decode, count, AGREEING) for count in (1, most))
    at_best = f"{measured.ratio(alone)} for one sequence, {measured.ratio(many)} for {most}"
    said = f"At 95 % agreement at best {at_best}, on a CPU core"
    if "gpu" in results.content:
        gpu = measured.find(results.content["gpu"], "decode_speed_ratio_threshold_0.5_batch_1")
        said += f". On an H200, a model of 24 layers that counts, all tokens leaving after 6: {gpu['value']:.2f}"
    asking = measured.find_any(decode, "exits_over_full_")["context"]["eta"]
    return (
        said,
        f"to ask an exit costs {asking:.1f} of these layers; in a model of width 4096, a part of one",
    )


def _large_batches(results: Results) -> tuple[str, str]:
    serve = results.content["serve"]
    most = measured.residents(serve)[-1]
    over = [float(row[2].split()[0]) for row in measured.serving_rows(serve, most)]
    return (
        f"{most} at a time: {min(over):.2f} to {max(over):.2f} of full depth, by strategy and policy",
        "a full launch computes, instead of waiting for weights: exits spare nothing under exact keys and values, as "
        "each token runs through all layers in the end",
    )


def _mixed(results: Results) -> tuple[str, str]:
    serve = results.content["serve"]
    rows = [row for number in measured.residents(serve) for row in measured.serving_rows(serve, number)]
    best = max(rows, key=lambda row: float(row[2].split()[0]))
    lockstep = max(float(row[3].split()[0]) for row in rows)
    return (
        f"{best[0]}, {best[1]}: {best[2]} of full depth; over lockstep at most {lockstep:.2f}",
        "what mixing gains is over a scheduler that waits for its deepest row; one that refills rows has less to gain",
    )


def _sweet_spot(results: Results) -> tuple[str, str]:
    rows = [row for row in measured.exit_rows(results.content["decode"], 1) if row[0] == "recompute"]
    said = "; ".join(f"{row[1]}: {row[5].split()[0]} at {row[3]}" for row in rows)
    return (
        f"speed and agreement by threshold, one sequence: {said}",
        "how sure a model is depends on text and training; tools/calibrate_thresholds.py finds one for a risk",
    )


def _quality(results: Results) -> tuple[str, str]:
    rows = [row for row in measured.exit_rows(results.content["decode"], 1) if row[0] == "recompute"]
    row = min(rows, key=lambda row: abs(float(row[1]) - 0.95))
    return (
        f"{row[3]} of tokens as at full depth, at mean depth {row[2]} of 8",
        "exact keys and values keep errors from adding up",
    )


def _places(results: Results) -> tuple[str, str]:
    two, four, six = (
        results.loss("every_second", layer).mean - results.loss("every_second", 8).mean for layer in (2, 4, 6)
    )
    return (
        f"loss above the end's: at a quarter {two:.3f}, at half {four:.3f}, at three quarters {six:.3f}",
        "deeper models settle earlier, as a share of their depth",
    )


def _memory(results: Results) -> tuple[str, str]:
    costs = results.content["costs"]
    body, ends = 8 * costs["layer_parameters"], 2 * costs["head_parameters"]
    draft = 2 * costs["layer_parameters"] + ends
    share = draft / (body + ends + draft)
    return (
        f"counted: a draft model of two such layers would be {share:.0%} of both",
        "a share that falls with depth, and with a draft model that is smaller beside its target",
    )


def _sled(results: Results) -> tuple[str, str]:
    said = []
    for name, key in (("code", "sled_code"), ("novels", "sled_books")):
        best = measured.best_sled(results.content[key])
        said.append(f"{name} {100 * best['difference']:+.2f} points, {measured.deviations(best):+.1f} standard errors")
    return (
        f"the best of {len(results.content['sled_code']['cells'])} settings: {'; '.join(said)}",
        "it is said to bring back what layers know and the last one does not say; so small a model knows little",
    )


def _beaten(results: Results) -> tuple[str, str]:
    of = results.content["measures"]["against_the_text"]
    said = "; ".join(
        f"exit {layer} alone is right on {shares['only_exit']:.1%}, the end alone on {shares['only_final']:.1%}"
        for layer, shares in of.items()
    )
    return said, "true of tokens, of no exit as a whole; a deeper model has more layers to be late in"


def _frozen(results: Results) -> tuple[str, str]:
    cold, tuned, trained = (results.loss(config, 2) for config in ("cold", "tuned", "every_second"))
    said = (
        f"loss at a quarter of the depth {cold.text('.3f')} cold, {tuned.text('.3f')} tuned, {trained.text('.3f')} "
        "trained with exits"
    )
    if trained.widest:
        said += f"; cold, seeds are {cold.widest / trained.widest:.1f} times as far apart as trained with exits"
    return said, "larger models keep more to the last layers"


def _warm_up(results: Results) -> tuple[str, str]:
    constant, usual = results.loss("constant_weights", 8), results.loss("every_second", 8)
    cooling = results.loss("cool_down", 8)
    return (
        f"nothing was unstable: at the end {constant.text('.3f')} without warm-up, {usual.text('.3f')} with it, "
        f"{cooling.text('.3f')} when weights cool down instead",
        "instability is a thing of larger models and longer runs; here exits' losses help from the first step on",
    )


def _energy(results: Results) -> tuple[str, str]:
    alone = measured.fastest_exit(results.content["decode"], 1, AGREEING)
    return (
        f"not measured. CPU seconds a token fall by what speed rises, {alone['value']:.2f}; arithmetic saved under "
        "exact keys and values: none",
        "bytes of weights not read are what is saved, and the more a model waits for them the more it counts",
    )
