"""docs/results.md from the figures beside it: words are the template's, every number is a file's."""

from collections.abc import Iterable
from pathlib import Path

import jinja2
import reproduce_measured
from reproduce_claims import claims_of
from reproduce_results import Results, Spread

LAYERSKIP = {
    "dropout_only": ("to 10 %", "none"),
    "loss_only": ("none", "rotational"),
    "loss_only_gradual": ("none", "gradual"),
    "layerskip": ("to 10 %", "rotational"),
    "layerskip_gradual": ("to 10 %", "gradual"),
    "dropout_30": ("linear to 30 %", "rotational"),
}
"""Config -> its dropout, and its exits' losses."""
WEIGHTS_AND_HEADS = {
    "every_second": "weights warm up over a quarter, as in all others",
    "constant_weights": "constant from the start",
    "long_warmup": "warm up over three quarters",
    "cool_down": "cool down from 1 to 0.1 over three quarters",
    "mlp_heads": "an MLP before each norm",
    "block_heads": "a layer before each norm",
    "own_projections": "a projection of each exit's own",
}
ON_A_FINISHED_MODEL = {
    "cold": "cold",
    "tuned_random": "tuned, from random",
    "tuned": "tuned, from copies",
    "every_second": "from the beginning, norms",
    "mlp_heads": "from the beginning, MLPs",
}

TEMPLATE = Path(__file__).parent / "reproduce_page.jinja"


def page_of(results: Results) -> str:
    """The whole document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # markdown
    )
    environment.filters |= {"row": _row, "at": _at, "accepted": _accepted}
    return environment.get_template(TEMPLATE.name).render(
        results=results,
        claims=list(claims_of(results)) if results.is_complete else [],
        measured=reproduce_measured,
        layerskip=LAYERSKIP,
        weights_and_heads=WEIGHTS_AND_HEADS,
        on_a_finished_model=ON_A_FINISHED_MODEL,
        **results.content,
    )


def _row(cells: Iterable[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(_text, cells))} |"


def _text(cell: object) -> str:
    if isinstance(cell, Spread):
        return cell.text(".3f")
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return str(cell)


def _at(layer: int, results: Results, config: str) -> Spread:
    return results.loss(config, layer)


def _accepted(layer: int, results: Results, config: str) -> str:
    return results.acceptance(config, layer).text(".1%")
