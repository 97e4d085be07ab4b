"""What a calibration leaves: files of thresholds, all figures as json, and a page for people."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibration import Calibrated
from calibration_path import thresholds_as_text
from calibration_prompts import Parts
from calibration_results import Promise, Terms, as_json, interval_of, p_value_of, promise_as_json
from calibration_runs import Measured
from html_page import HtmlPage

from megatron_ee import __version__
from megatron_ee.config import Config, to_yaml
from megatron_ee.inference.calibration.thresholds_file import write_thresholds
from megatron_ee.inference.json_files import write_json


@dataclass(frozen=True)
class Reported:
    """
    Attributes:
        folder: of the model.
        checkpoint_hash: see `hash_of_model`.
        config: that it was decoded with.
    """

    folder: Path
    checkpoint_hash: str
    config: Config
    parts: Parts
    terms: Terms
    calibrated: Calibrated

    @property
    def full(self) -> dict[str, Measured]:
        """Full depth on both parts."""
        return {"calibration": self.calibrated.full, "fresh": self.calibrated.full_fresh}


def report(output: Path, of: Reported) -> None:
    """Print what is promised, and write all files into a folder."""
    print(*lines(of), sep="\n")
    files = {promise.target: output / _name(promise, of.calibrated.promises) for promise in of.calibrated.promises}
    for promise in of.calibrated.promises:
        said = promise_as_json(promise, of.full, of.terms)
        sampling = of.config.inference.sampling
        write_thresholds(files[promise.target], of.checkpoint_hash, promise.params, sampling, said)
        print(files[promise.target])
    figures = output / "calibration.json"
    write_json(figures, content(of))
    print(figures)
    page = page_of(of, files)
    page.save(output / "calibration.html")
    print(output / "calibration.html")


def lines(of: Reported) -> Iterator[str]:
    """A table of the candidates, and what is promised."""
    yield f"{'':<24}{of.terms.risk:>13}{'worst tenth':>13}{'mean depth':>12}{'speed':>8}   thresholds"
    for measured in of.calibrated.measured:
        speed = measured.tokens_per_second / of.calibrated.full.tokens_per_second
        thresholds = thresholds_as_text(measured.candidate.params.thresholds)
        yield (
            f"{measured.candidate.name:<24}{measured.risk:>13.2%}{measured.worst_decile:>13.2%}"
            f"{measured.mean_depth:>12.2f}{speed:>7.2f}x   {thresholds}"
        )
    yield ""
    for promise in of.calibrated.promises:
        yield sentence(promise, of)
    yield ""


def sentence(promise: Promise, of: Reported) -> str:
    """What is promised at a target, and what fresh prompts say."""
    chosen, fresh, full = promise.chosen, promise.fresh, of.calibrated.full
    if chosen is None:
        return f"{promise.target:g}: nothing can be promised: full depth itself loses {full.risk:.2%}"
    assert fresh is not None
    if chosen.candidate.params.mode == "full":
        return f"{promise.target:g}: full depth alone. {_more(promise, of)}"
    low, high = interval_of(fresh.losses_N)
    speed = chosen.tokens_per_second / full.tokens_per_second
    return (
        f"{promise.target:g}: {chosen.candidate.name} ({thresholds_as_text(chosen.candidate.params.thresholds)}): "
        f"{of.terms.risk} {chosen.risk:.2%}, on fresh prompts {fresh.risk:.2%} ({low:.2%} to {high:.2%}); mean depth "
        f"{chosen.mean_depth:.2f} of {of.config.model.num_layers}, {speed:.2f}x as fast as full depth"
    )


def content(of: Reported) -> dict[str, Any]:
    """All figures."""
    return {
        "checkpoint": str(of.folder),
        "checkpoint_hash": of.checkpoint_hash,
        "prompts": {name: len(getattr(of.parts, name).prompts) for name in Parts._fields},
        "settings": of.config.inference.model_dump(mode="json"),
        "machine": machine(),
        "candidates": [as_json(measured, of.calibrated.full) for measured in of.calibrated.measured],
        "promises": [promise_as_json(promise, of.full, of.terms) for promise in of.calibrated.promises],
    }


def machine() -> dict[str, str]:
    """What speeds and roundings depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "megatron_ee": __version__,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }


def page_of(of: Reported, files: dict[float, Path]) -> HtmlPage:
    """For people."""
    page = HtmlPage("Calibrated thresholds", subtitle=f"{of.folder}, {of.checkpoint_hash[:12]}")
    calibrated = of.calibrated
    page.heading("What is promised")
    page.table(
        ["target", "candidate", "measured", "fresh prompts", "95 % interval", "worst tenth", "mean depth", "speed"],
        [_row(promise, of) for promise in calibrated.promises],
        caption=f"{of.terms.risk}; speed over full depth while calibrating, one run each",
    )
    page.points(sentence(promise, of) for promise in calibrated.promises)
    page.text("Deploy a file, for this checkpoint alone:")
    page.points(f"inference.thresholds_file={file}" for file in files.values())
    _pictures(page, of)
    page.heading("Candidates")
    p_values = [f"p at {promise.target:g}" for promise in calibrated.promises]
    exits = sorted({layer for measured in calibrated.measured for layer in measured.candidate.params.thresholds})
    page.table(
        ["candidate", "risk", "worst tenth", *p_values, "depth", "speed", *(f"exit {layer}" for layer in exits)],
        [_candidate_row(measured, of, exits) for measured in calibrated.measured],
        caption=f"on {len(of.parts.calibration.prompts)} prompts: how many may be wrong at each exit, and thresholds",
    )
    page.heading("What the promise rests on")
    page.points(assumptions(of))
    page.heading("How it was made")
    page.facts(
        {
            "method": of.terms.method,
            "prompts": ", ".join(f"{name} {len(getattr(of.parts, name).prompts)}" for name in Parts._fields),
            "new tokens": of.config.inference.sampling.max_new_tokens,
            "KV policy": of.config.inference.exit.kv_policy,
            "measure": of.config.inference.exit.measure,
            "temperature": of.config.inference.sampling.temperature,
            **machine(),
        }
    )
    page.details("config", to_yaml(of.config))
    return page


def assumptions(of: Reported) -> Iterator[str]:
    """What has to hold for the promise to hold."""
    exit, sampling = of.config.inference.exit, of.config.inference.sampling
    yield "Prompts that come are drawn as those of the calibration were, and independent of each other."
    yield (
        f"They are decoded by the same model and settings: measure {exit.measure}, KV policy {exit.kv_policy}, "
        f"temperature {sampling.temperature:g}. What is named in the file is checked where it is deployed; a request "
        "that asks for other settings has no promise."
    )
    yield (
        f"Answers have at most {sampling.max_new_tokens} tokens. The risk is a mean over prompts: a single answer may "
        "lose far more, as the worst tenth shows."
    )
    yield "Which rows run together changes no token, so batches may be others. Another device rounds otherwise."
    if of.terms.method == "conformal":
        yield "It holds on average over calibrations: this one may be above it."
    else:
        yield (
            f"It fails in at most {of.terms.delta:.0%} of all calibrations, for each target by itself: of several "
            "targets one may fail more often."
        )


def _row(promise: Promise, of: Reported) -> list[str | float | None]:
    chosen, fresh = promise.chosen, promise.fresh
    if chosen is None or fresh is None:
        return [f"{promise.target:.1%}", "none", *[None] * 6]
    low, high = interval_of(fresh.losses_N)
    speed = chosen.tokens_per_second / of.calibrated.full.tokens_per_second
    return [
        f"{promise.target:.1%}",
        chosen.candidate.name,
        f"{chosen.risk:.2%}",
        f"{fresh.risk:.2%}",
        f"{low:.2%} to {high:.2%}",
        f"{chosen.worst_decile:.2%}",
        f"{chosen.mean_depth:.2f}",
        f"{speed:.2f}x",
    ]


def _candidate_row(measured: Measured, of: Reported, exits: Sequence[int]) -> list[str | float | None]:
    p_values = [p_value_of(measured, promise.target, of.terms) for promise in of.calibrated.promises]
    thresholds = measured.candidate.params.thresholds
    return [
        measured.candidate.name,
        f"{measured.risk:.2%}",
        f"{measured.worst_decile:.2%}",
        *(None if p_value is None else f"{p_value:.3f}" for p_value in p_values),
        f"{measured.mean_depth:.2f}",
        f"{measured.tokens_per_second / of.calibrated.full.tokens_per_second:.2f}x",
        *(None if (at := thresholds.get(layer, 1.0)) >= 1 else f"{at:g}" for layer in exits),
    ]


def _pictures(page: HtmlPage, of: Reported) -> None:
    try:
        from calibration_picture import curve, depths, losses
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        page.text("There are no pictures: they need matplotlib, pip install 'megatron-ee[plots]'.")
        return
    page.heading("Quality against depth and speed")
    page.picture(curve(of.calibrated, of.terms.risk), alt=f"{of.terms.risk} of candidates against depth and speed")
    page.heading("Where tokens leave")
    page.picture(depths(of.calibrated), alt="share of tokens by the layer after which they leave")
    page.heading("Who loses most")
    page.picture(losses(of.calibrated, of.terms.risk), alt=f"{of.terms.risk} of prompts, from the least to the most")


def _more(promise: Promise, of: Reported) -> str:
    after = promise.next
    if after is None:
        return "There is no other candidate."
    return (
        f"The next, {after.candidate.name}, loses {after.risk:.2%} on {len(after.losses_N)} prompts, which does not "
        "show that it keeps the target: more prompts may (--count), or --method betting."
    )


def _name(promise: Promise, promises: Sequence[Promise]) -> str:
    return "thresholds.json" if len(promises) == 1 else f"thresholds_{promise.target:g}.json"
