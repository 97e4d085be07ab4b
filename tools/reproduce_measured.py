"""Rows of the page's tables from the files of the benches and of other programs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]
Bench = Sequence[Figures]
"""What `make bench-NAME` leaves: a list of measures."""


def find(bench: Bench, name: str) -> Figures:
    """One measure of a bench."""
    return next(measure for measure in bench if measure["measure"] == name)


def find_any(bench: Bench, prefix: str) -> Figures:
    """The first measure whose name begins so."""
    return next(measure for measure in bench if measure["measure"].startswith(prefix))


def sizes(bench: Bench, prefix: str, letter: str) -> list[int]:
    """The numbers of sequences at which measures with such names were taken, ascending; a name ends in letter and
    number."""
    ends = (re.fullmatch(rf"{prefix}.*_{letter}(\d+)", measure["measure"]) for measure in bench)
    return sorted({int(end[1]) for end in ends if end})


def most_sequences(decode: Bench) -> int:
    return sizes(decode, "exits_over_full_", "b")[-1]


def residents(serve: Bench) -> list[int]:
    return sizes(serve, "serve_over_full_", "r")


def streams(serve: Bench) -> list[int]:
    return sizes(serve, "pipeline_over_full_", "s")


def ratio(measure: Figures) -> str:
    """The median over rounds, and the 10th and 90th percentile."""
    low, high = measure["spread"]
    return f"{measure['value']:.2f} [{low:.2f}, {high:.2f}]"


def exit_rows(bench: Bench, sequences: int) -> Iterator[list[str]]:
    """Of each policy and threshold: depth, agreement, loss under the full model, speed, the ideal, the verdict."""
    for measure, setting in _named(bench, "exits_over_full_", f"_b{sequences}"):
        context, (words, _, threshold) = measure["context"], setting.rpartition("_")
        yield [
            words.replace("_", " "),
            threshold,
            f"{context['mean_depth']:.2f}",
            f"{context['agreement']:.1%}",
            f"{context['loss_under_full_depth']:.3f}",
            ratio(measure),
            f"{context['ideal']:.2f}",
            str(context["verdict"]),
        ]


def speculation_rows(bench: Bench, sequences: int) -> Iterator[list[str]]:
    """Of each exit and length: acceptance, tokens a cycle, speed, the law, and the share of it that is reached."""
    for measure, setting in _named(bench, "speculation_over_full_", f"_b{sequences}"):
        context, (exit, length) = measure["context"], setting.split("_")
        of_law = find(bench, f"speculation_of_law_{setting}_b{sequences}")
        yield [
            exit.removeprefix("E"),
            length.removeprefix("d"),
            f"{context['acceptance']:.1%}",
            f"{context['tokens_per_cycle']:.2f}",
            ratio(measure),
            f"{context['law']:.2f}",
            f"{of_law['value']:.2f}",
        ]


def serving_rows(bench: Bench, residents: int) -> Iterator[list[str]]:
    """Of each strategy and policy: tokens per second over full depth and over lockstep, what all wait, forced exits."""
    for measure, setting in _named(bench, "serve_over_full_", f"_r{residents}"):
        strategy, _, policy = setting.partition("_")
        over = [of for of, name in _named(bench, "serve_over_lockstep_", f"_r{residents}") if name == setting]
        report = measure["context"]["report"]
        yield [
            strategy,
            policy,
            ratio(measure),
            ratio(over[0]) if over else "1",
            f"{report['request']['p95']:.2f}",
            f"{report['request']['p99']:.2f}",
            str(measure["context"]["forced"]),
        ]


def pipeline_rows(bench: Bench) -> Iterator[list[str]]:
    """Of stages that sleep: their cut, the policy, streams, and tokens per second over full depth."""
    for number in streams(bench):
        for measure, setting in _named(bench, "pipeline_over_full_", f"_s{number}"):
            cut, _, policy = setting.partition("_")
            yield [str(number), cut, policy, ratio(measure), f"{measure['aa']:.2f}"]


def agreement_rows(measures: Figures) -> Iterator[list[str]]:
    """By measure of confidence: agreement with full depth at mean depths."""
    for name, values in measures["at_mean_depth"].items():
        if name != "depth":
            yield [name.replace("_", " "), *(f"{value:.1%}" for value in values)]


def ranking(measures: Figures) -> str:
    """Measures of confidence, the best first, by their agreement with full depth in the middle of the depths."""
    depths = measures["at_mean_depth"]["depth"]
    found = {name: of[len(depths) // 2] for name, of in measures["at_mean_depth"].items() if name != "depth"}
    best_first = sorted(found, key=lambda name: -found[name])
    said = ", ".join(f"{name.replace('_', ' ')} {found[name]:.1%}" for name in best_first)
    return f"At a mean depth of {depths[len(depths) // 2]:g} layers they agree with full depth on: {said}"


def best_sled(sweep: Figures) -> Figures:
    """The setting that gains the most tokens over full depth, by chance or not."""
    return max(sweep["cells"], key=lambda cell: cell["difference"])


def deviations(cell: Figures) -> float:
    return float(cell["difference"] / cell["standard_error"]) if cell["standard_error"] else 0.0


def correction_rows(evaluation: Figures) -> Iterator[list[str]]:
    """Of each text: next tokens that are right at full depth, with SLED and with DoLa."""
    subjects = dict.fromkeys(cell["subject"] for cell in evaluation["cells"])
    for subject in subjects:
        right = {
            cell["mode"]: cell["figures"]["accuracy"] for cell in evaluation["cells"] if cell["subject"] == subject
        }
        yield [subject, *(f"{right[mode]:.2%}" for mode in ("full", "sled", "dola"))]


def fastest_exit(bench: Bench, sequences: int, least_agreement: float) -> Figures:
    """The fastest setting, of any policy and measure, that agrees so often; where none does, the fastest of all."""
    settings = [of for of, _ in _named(bench, "exits_over_full_", f"_b{sequences}")]
    agreeing = [of for of in settings if of["context"]["agreement"] >= least_agreement]
    return max(agreeing or settings, key=lambda of: of["value"])


def exit_setting(measure: Figures) -> str:
    """The policy or measure of such a setting, and its threshold."""
    words, threshold, _ = str(measure["measure"]).removeprefix("exits_over_full_").rsplit("_", 2)
    return f"{words.replace('_', ' ')}, {threshold}"


def fastest_speculation(bench: Bench, sequences: int) -> Figures:
    """Of what is drafted: a setting that learns to draft nothing is as fast as full depth, give or take."""
    settings = [of for of, _ in _named(bench, "speculation_over_full_", f"_b{sequences}")]
    drafting = [of for of in settings if of["context"]["acceptance"] > 0]
    return max(drafting or settings, key=lambda of: of["value"])


def setting_of(measure: Figures) -> list[str]:
    """The exit and the length of a measure of self-speculation."""
    exit, length = str(measure["measure"]).removeprefix("speculation_over_full_").split("_")[:2]
    return [exit.removeprefix("E"), length.removeprefix("d")]


def _named(bench: Bench, prefix: str, suffix: str) -> Iterator[tuple[Figures, str]]:
    """Measures of such a name, and what stands between."""
    for measure in bench:
        name = measure["measure"]
        if name.startswith(prefix) and name.endswith(suffix):
            yield measure, name.removeprefix(prefix).removesuffix(suffix)
